"""The whole engine on a GPU: transformers' tokens in float32, and in bfloat16 the same up to ties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from local_engine import LocalEngine, greedy
from twins import load_truth

from sailfish.base.config import EngineConfig
from sailfish.build.builder import build_engine
from sailfish.data import demo_model

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
