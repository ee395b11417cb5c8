"""The measure's arithmetic, on an engine whose clock the test holds."""

from __future__ import annotations

import asyncio
import lzma
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from sailfish.base.errors import ConfigError
from sailfish.bench import asking, prefix
from sailfish.bench import engine as bench
from sailfish.bench import replay as replaying
from sailfish.bench.replay import percentile, read_trace, replay
from sailfish.engine.api import Chunk, Options, SamplingParams
from sailfish.engine.client import AsyncEngine

FIRST_S, STEP_S = 2.0, 0.5


class _Clock:
    """Stands in for time.perf_counter; answers move it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s


class _FakeEngine:
    """Each batch takes FIRST_S to its first tokens and STEP_S for every further step, in lockstep."""

    def __init__(self, clock: _Clock) -> None:
        self.clock = clock
        self.prompts: list[list[int]] = []
        self.info = SimpleNamespace(vocab_size=50, max_sequences=4, context_tokens=4096)

    async def submit(
        self, prompt_ids: list[int], params: SamplingParams, options: Options = Options()
    ) -> AsyncIterator[Chunk]:
        assert params.ignore_eos
        assert params.temperature == 0.0
        self.prompts.append(prompt_ids)
        start_s = self.clock.now_s

        async def chunks() -> AsyncIterator[Chunk]:
            for i in range(params.max_tokens or 0):
                await asyncio.sleep(0)
                self.clock.now_s = max(self.clock.now_s, start_s + FIRST_S + i * STEP_S)
                yield Chunk(index=0, text="", token_ids=[1])

        return chunks()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> _FakeEngine:
    clock = _Clock()
    monkeypatch.setattr(asking, "time", clock)
    monkeypatch.setattr(replaying, "time", clock)
    return _FakeEngine(clock)


def _measured(engine: _FakeEngine, *cases: bench.Case, seed: int = 0) -> list[bench.Measured]:
    async def run() -> list[bench.Measured]:
        return [row async for row in bench.measure(cast(AsyncEngine, engine), cases, repeats=2, seed=seed)]

    return asyncio.run(run())


def test_a_decode_row_takes_off_what_one_token_each_costs(engine: _FakeEngine) -> None:
    [measured] = _measured(engine, bench.Case(kind="decode", batch=3, n_in=10, n_out=5))
    assert measured.values == pytest.approx([3 * 4 / (4 * STEP_S)] * 2)


def test_the_other_rows_count_prompt_and_generated_tokens_over_all_their_time(engine: _FakeEngine) -> None:
    first, prefill, output = _measured(
        engine,
        bench.Case(kind="ttft", batch=1, n_in=10, n_out=1),
        bench.Case(kind="prefill", batch=3, n_in=10, n_out=1),
        bench.Case(kind="tput", batch=3, n_in=10, n_out=5),
    )
    assert first.values == pytest.approx([FIRST_S * 1e3] * 5)
    assert prefill.values == pytest.approx([3 * 10 / FIRST_S] * 2)
    assert output.values == pytest.approx([3 * 5 / (FIRST_S + 4 * STEP_S)] * 2)


def test_no_two_prompts_are_equal_so_that_no_prefix_is_reused(engine: _FakeEngine) -> None:
    for seed in (0, 1):
        _measured(engine, bench.Case(kind="decode", batch=4, n_in=16, n_out=2), seed=seed)
    assert len({tuple(prompt) for prompt in engine.prompts}) == len(engine.prompts)


def test_rows_have_the_peers_names_and_name_their_lengths_where_they_had_to_be_cut() -> None:
    usual = [case.name for case in bench.cases_for(131072, 256, bench.BATCHES)]
    assert usual == [
        *(f"decode B={batch}" for batch in (1, 16, 64, 256)),
        *(f"generate B={batch} (128 in, 256 out)" for batch in (1, 16, 64, 256)),
        "ttft 2048",
        "prefill 64 x 2048",
        "tput 512 x (512 in, 256 out)",
    ]
    cut = bench.cases_for(context_tokens=256, max_sequences=4, batches=[1, 4, 16])
    assert [case.name for case in cut] == [
        "decode B=1 (64 in, 192 out)",
        "decode B=4 (64 in, 192 out)",
        "generate B=1 (64 in, 192 out)",
        "generate B=4 (64 in, 192 out)",
        "ttft 128",
        "prefill 4 x 128",
        "tput 8 x (128 in, 128 out)",
    ]
    assert all(case.n_in + case.n_out <= 256 for case in cut)


def test_the_common_part_of_prompts_is_asked_for_before_it_is_measured(engine: _FakeEngine) -> None:
    shared = asyncio.run(prefix.measure_share(cast(AsyncEngine, engine), 50, repeats=1))
    n_common = prefix.PROMPT_TOKENS // 2
    assert len(engine.prompts) == 1 + 4 + 4 + 5  # one to fill the cache, four to warm up
    assert len({tuple(prompt[:n_common]) for prompt in engine.prompts}) == 1
    assert len({tuple(prompt) for prompt in engine.prompts}) == len(engine.prompts)
    figures = list(shared.figures())
    assert [row for row, _, _ in figures] == [
        "prefix 50 % (4 requests): requests",
        "prefix 50 % (4 requests): lone ttft",
    ]
    assert figures[0][1] == pytest.approx([4 / (FIRST_S + 15 * STEP_S)])


def test_a_replay_waits_for_each_arrival_and_times_from_there(
    engine: _FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    real_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds:
            waited.append(seconds)
        await real_sleep(0)

    monkeypatch.setattr(replaying, "asyncio", SimpleNamespace(sleep=sleep, gather=asyncio.gather))
    replayed = asyncio.run(replay(cast(AsyncEngine, engine), [(5, 3), (6, 1)], rate=8))
    assert len(waited) == 1  # the first is due at once
    assert sorted(map(len, engine.prompts)) == [5, 6]
    assert replayed.gap_ms == pytest.approx([STEP_S * 1e3] * 2)
    assert replayed.token_ms == pytest.approx([STEP_S * 1e3])
    names = [name for name, _, _ in replayed.figures()]
    assert names[:5] == ["output", "ttft p50", "ttft p90", "ttft p99", "gap p50"]


def test_a_trace_is_read_plain_and_compressed_and_capped(tmp_path: Path) -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023,374,44\n2023,9000,1200\n2023,5,0\n"
    plain, packed = tmp_path / "trace.csv", tmp_path / "trace.csv.xz"
    plain.write_text(text)
    packed.write_bytes(lzma.compress(text.encode()))
    assert read_trace(plain) == read_trace(packed) == [(374, 44), (4096, 800), (5, 1)]


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "ContextTokens,GeneratedTokens\n1,x\n"])
def test_what_is_no_trace_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is no trace"):
        read_trace(path)
    with pytest.raises(ConfigError, match="is no trace"):
        read_trace(tmp_path / "absent.csv")


def test_a_percentile_is_a_value_that_occurred() -> None:
    values = [float(i) for i in range(100, 0, -1)]
    assert (percentile(values, 50), percentile(values, 99), percentile(values, 100)) == (51.0, 100.0, 100.0)
    assert percentile([], 50) == 0.0
