"""The measure's arithmetic, on an engine whose clock the test holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import cast

import pytest

from sailfish.bench import engine as bench
from sailfish.bench.results import Recorder
from sailfish.engine.api import Chunk, SamplingParams
from sailfish.engine.client import AsyncEngine

FIRST_S, STEP_S = 2.0, 0.5
_RECORDER = Recorder(suite="engine", device="a machine", command="bench", calibration={})


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
        self.info = SimpleNamespace(vocab_size=50)

    async def submit(self, prompt_ids: list[int], params: SamplingParams) -> AsyncIterator[Chunk]:
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


def _measured(
    monkeypatch: pytest.MonkeyPatch, cases: list[bench.Case]
) -> tuple[list[bench.Measured], _FakeEngine]:
    clock = _Clock()
    monkeypatch.setattr(bench, "time", clock)
    engine = _FakeEngine(clock)

    async def run() -> list[bench.Measured]:
        return [row async for row in bench.measure(cast(AsyncEngine, engine), cases, repeats=3)]

    return asyncio.run(run()), engine


def test_rates_follow_from_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    [measured], engine = _measured(monkeypatch, [bench.Case(batch=3, n_in=10, n_out=5)])
    assert [run.total_s for run in measured.runs] == pytest.approx([FIRST_S + 4 * STEP_S] * 3)
    assert measured.prefill_per_s == pytest.approx([3 * 10 / FIRST_S] * 3)
    assert measured.decode_per_s == pytest.approx([3 * 4 / (4 * STEP_S)] * 3)
    assert measured.output_per_s == pytest.approx([3 * 5 / (FIRST_S + 4 * STEP_S)] * 3)
    assert len(engine.prompts) == (1 + 3) * 3


def test_a_case_of_one_token_measures_prefill_only(monkeypatch: pytest.MonkeyPatch) -> None:
    [measured], _ = _measured(monkeypatch, [bench.Case(batch=1, n_in=20, n_out=1)])
    assert measured.decode_per_s == []
    first, rate = measured.results(_RECORDER, "fake")
    assert (first.value, first.unit) == (FIRST_S * 1e3, "ms")
    assert (rate.value, rate.unit) == (20 / FIRST_S, "tokens/s")
    assert rate.row == "fake, batch 1, 20 in, 1 out: prefill"


def test_rows_are_named_after_their_case(monkeypatch: pytest.MonkeyPatch) -> None:
    [measured], _ = _measured(monkeypatch, [bench.Case(batch=2, n_in=4, n_out=3)])
    names = [row.row for row in measured.results(_RECORDER, "fake")]
    case = "fake, batch 2, 4 in, 3 out"
    assert names == [f"{case}: time to first token", f"{case}: decode", f"{case}: output"]
    assert "decode        4.0 tokens/s" in measured.summary()


def test_no_two_prompts_are_equal_so_that_no_prefix_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, engine = _measured(monkeypatch, [bench.Case(batch=4, n_in=16, n_out=2)])
    assert len({tuple(prompt) for prompt in engine.prompts}) == len(engine.prompts)


def test_cases_fit_the_engine() -> None:
    cases = bench.cases_for(context_tokens=256, max_sequences=4, batches=[1, 4, 16])
    assert [case.batch for case in cases] == [1, 1, 4, 8]
    assert all(case.n_in + case.n_out <= 256 for case in cases)
