"""The whole engine on a GPU: transformers' tokens in float32, and in bfloat16 the same up to ties."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from local_engine import LocalEngine, greedy
from twins import load_truth

from sailfish.base.config import EngineConfig
from sailfish.build.builder import build_engine
from sailfish.data import demo_model
from sailfish.engine import wire
from sailfish.engine.step import RowSampling

pytestmark = pytest.mark.gpu
PROMPTS = [[1000 + 37 * i + j for j in range(1 + 5 * i)] for i in range(12)]
SMALL = {"device": "cuda", "context_tokens": 512, "kv_bytes": 64 << 20}


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "engine"
    build_engine(demo_model(), path, config=EngineConfig(device="cuda"))
    return path


def answers(engine: LocalEngine, *, alone: bool) -> None:
    for key, prompt in enumerate(PROMPTS):
        engine.submit(key, prompt, greedy(8192, logprobs=2), 150)
        if alone:
            engine.run()
    engine.run()


@pytest.mark.parametrize("lag", [0, 1])
def test_float32_tokens_are_those_of_transformers(engine_dir: Path, lag: int) -> None:
    config: dict[str, Any] = {**SMALL, "dtype": "float32", "max_sequences": 5, "step_tokens": 32}
    engine = LocalEngine(engine_dir, EngineConfig(lag=lag, **config))
    answers(engine, alone=False)
    truth = load_truth(demo_model())
    for key, prompt in enumerate(PROMPTS):
        tokens = engine.heard[key].token_ids
        with torch.inference_mode():
            logits_QV = truth(torch.tensor([prompt + tokens])).logits[0]
        assert logits_QV[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


@pytest.mark.parametrize("lag", [0, 1])
def test_bfloat16_tokens_differ_from_those_alone_at_ties_only(engine_dir: Path, lag: int) -> None:
    config: dict[str, Any] = {**SMALL, "dtype": "bfloat16"}
    together = LocalEngine(engine_dir, EngineConfig(lag=lag, max_sequences=5, step_tokens=32, **config))
    single = LocalEngine(engine_dir, EngineConfig(max_sequences=1, prefix_cache=False, **config))
    answers(together, alone=False)
    answers(single, alone=True)
    gaps = []
    for key in range(len(PROMPTS)):
        one, other = single.heard[key], together.heard[key]
        at = next((i for i in range(150) if one.token_ids[i] != other.token_ids[i]), None)
        if at is not None:
            best, second = one.logprobs[at].top
            assert {best.token_id, second.token_id} == {one.token_ids[at], other.token_ids[at]}
            gaps.append(best.logprob - second.logprob)
    print(f"first differences: {len(gaps)} of {len(PROMPTS)}, gaps {gaps}")  # noqa: T201 - the figure asked for
    # Logits near 16 are 0.125 apart in bfloat16; two of them may each be rounded by half of that.
    assert all(gap <= 0.125 for gap in gaps), gaps


def as_captured(engine: LocalEngine) -> LocalEngine:
    """Let the engine launch one by one what it has captured, padding included."""
    runner = engine.booted.runner
    runner._graphs.replay = runner._decode  # type: ignore[method-assign]
    runner._graphs.replay_chunk = runner._forward_alone  # type: ignore[method-assign]
    return engine


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_a_replayed_step_draws_what_its_launches_draw_whatever_comes_and_goes(
    engine_dir: Path, seed: int, lag: int
) -> None:
    """Starts, chunks, preemptions, aborts and all kinds of sampling; every token is equal."""
    config: dict[str, Any] = {**SMALL, "kv_bytes": 5 << 17, "max_sequences": 11, "step_tokens": 48}
    heard = []
    for wrap in (lambda engine: engine, as_captured):
        engine = wrap(LocalEngine(engine_dir, EngineConfig(dtype="bfloat16", lag=lag, **config)))
        assert engine.booted.plan.graph_buckets == (1, 2, 4, 8, 11)
        assert engine.booted.plan.graph_chunks == (16, 32, 48)
        replays = count_replays(engine)
        draw = random.Random(seed)
        for key in range(40):
            prompt = [draw.randrange(8192) for _ in range(draw.choice([1, 2, 30, 90]))]
            engine.submit(key, prompt, random_sampling(draw), draw.randrange(1, 90))
            for _ in range(draw.randrange(0, 6)):
                engine.loop.step()
            if draw.random() < 0.2:
                engine.tell(wire.Abort(draw.randrange(key + 1), False))
        engine.run()
        assert engine.scheduler.stats.preemptions > 0
        assert all(sum(replays[kind, n] > 0 for n in range(50)) >= 3 for kind in ("decode", "chunk"))
        heard.append({key: (one.token_ids, one.finishes) for key, one in engine.heard.items()})
    assert heard[0] == heard[1]


def count_replays(engine: LocalEngine) -> Counter[tuple[str, int]]:
    """Count the captured steps that run, by their kind and size."""
    graphs = engine.booted.runner._graphs
    counts: Counter[tuple[str, int]] = Counter()

    def counted(kind: str, inner: Callable[[int], torch.Tensor], size: int) -> torch.Tensor:
        counts[kind, size] += 1
        return inner(size)

    graphs.replay = partial(counted, "decode", graphs.replay)  # type: ignore[method-assign]
    graphs.replay_chunk = partial(counted, "chunk", graphs.replay_chunk)  # type: ignore[method-assign]
    return counts


def random_sampling(draw: random.Random) -> RowSampling:
    changes: dict[str, Any] = {
        "temperature": draw.choice([0.0, 0.0, 0.7, 1.5]),
        "top_k": draw.choice([8192, 8192, 40]),
        "top_p": draw.choice([1.0, 0.9]),
        "min_p": draw.choice([0.0, 0.02]),
        "repetition_penalty": draw.choice([1.0, 1.2]),
        "presence_penalty": draw.choice([0.0, 0.5]),
        "seed": draw.randrange(2**63),
    }
    if draw.random() < 0.3:
        changes |= {"min_tokens": 5, "stop_token_ids": tuple(draw.sample(range(8192), 3))}
    if draw.random() < 0.3:
        changes["logit_bias"] = tuple((i, draw.uniform(-5, 5)) for i in draw.sample(range(8192), 9))
    if draw.random() < 0.1:
        changes["logprobs"] = 2
    return greedy(8192, **changes)


def test_captured_bfloat16_tokens_are_the_likeliest_to_transformers_up_to_rounding(engine_dir: Path) -> None:
    engine = LocalEngine(engine_dir, EngineConfig(**{**SMALL, "max_sequences": 12}))
    replays = count_replays(engine)
    for key, prompt in enumerate(PROMPTS):
        engine.submit(key, prompt, greedy(8192), 150)
    engine.run()
    assert sum(n for (kind, _), n in replays.items() if kind == "decode") > 100
    truth = load_truth(demo_model())
    gaps = []
    for key, prompt in enumerate(PROMPTS):
        tokens = engine.heard[key].token_ids
        with torch.inference_mode():
            logits_QV = truth(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        chosen_Q = logits_QV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        gap_Q = logits_QV.amax(1) - chosen_Q
        gaps += gap_Q[gap_Q > 0].tolist()
    total = sum(len(engine.heard[key].token_ids) for key in range(len(PROMPTS)))
    print(f"not the likeliest in float32: {len(gaps)} of {total}, gaps {gaps}")  # noqa: T201 - as above
    assert len(gaps) <= 0.03 * total and all(gap <= 0.25 for gap in gaps), gaps


def test_captured_steps_take_no_more_memory_than_planned(engine_dir: Path) -> None:
    config = EngineConfig(**{**SMALL, "max_sequences": 64, "step_tokens": 2048})
    booted = LocalEngine(engine_dir, config).booted
    graphs = next(reading for reading in booted.memory if reading.name == "graphs")
    assert 0 < (graphs.measured_bytes or 0) <= graphs.planned_bytes, graphs
    assert booted.launches and all("decode_attention" in kernels for kernels in booted.launches.values())
