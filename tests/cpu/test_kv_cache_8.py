"""KV caches in 8 bits: the tokens of transformers with a cache rounded alike, and memory as planned."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from local_engine import LocalEngine, greedy
from torch import Tensor
from transformers import DynamicCache
from twins import VOCAB_SIZE, load_truth, make_twin

from sailfish.base.config import EngineConfig
from sailfish.build.builder import build_engine
from sailfish.kernels.contract import KvLayer

FLOAT32 = EngineConfig(dtype="float32")
TIGHT = replace(FLOAT32, page_tokens=8, step_tokens=48, max_sequences=6, context_tokens=320)
"""Prompts are cut in chunks, and most sequences wait for a row."""
FORMATS = ("int8", "fp8")
FAMILIES = ("llama", "qwen3", "mistral", "gemma2")
"""Plain, with norms of heads, with a window, and with soft-caps."""
NEW_TOKENS = 60


class Rounded(DynamicCache):
    """The cache of transformers with every key and value rounded on its way in, written out plainly."""

    def __init__(self, kv_dtype: str) -> None:
        super().__init__()
        self._is_int8 = kv_dtype == "int8"

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *more: Any, **named: Any
    ) -> Any:
        """Round, then keep."""
        keys, values = (self._round(x) for x in (key_states, value_states))
        return super().update(keys, values, layer_idx, *more, **named)

    def _round(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / (127.0 if self._is_int8 else 448.0)
        stored = (x / scale).round() if self._is_int8 else (x / scale).to(torch.float8_e4m3fn).float()
        return stored * scale


@pytest.fixture(scope="session")
def twins_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "twins"


def _engine(family: str, twins_path: Path) -> tuple[Path, Path]:
    """Return the twin and its engine, which any cache may start."""
    checkpoint, directory = make_twin(family, twins_path), twins_path / f"{family}.kv-engine"
    if not directory.exists():
        build_engine(checkpoint, directory, config=FLOAT32, target="cpu")
    return checkpoint, directory


def _prompts() -> list[list[int]]:
    """Prompts of many lengths; half of them share a beginning."""
    draw = random.Random(8)
    shared = [draw.randrange(256) for _ in range(90)]
    tails = [[draw.randrange(256) for _ in range(draw.randrange(1, 80))] for _ in range(8)]
    return [shared[: 40 + 6 * i] + tail if i % 2 else tail for i, tail in enumerate(tails)]


@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize(("family", "lag"), list(zip(FAMILIES, (0, 1, 0, 1), strict=True)))
def test_batched_chunked_cached_preempted_tokens_are_those_of_a_cache_rounded_alike(
    family: str, kv_dtype: str, lag: int, twins_path: Path
) -> None:
    checkpoint, directory = _engine(family, twins_path)
    room = LocalEngine(directory, replace(TIGHT, kv_dtype=kv_dtype)).booted.plan
    block_bytes = room.memory_bytes("kv_blocks") // room.n_blocks
    engine = LocalEngine(directory, replace(TIGHT, kv_dtype=kv_dtype, lag=lag, kv_bytes=60 * block_bytes))
    prompts = _prompts()
    for key, prompt in enumerate(prompts):
        engine.submit(key, prompt, greedy(VOCAB_SIZE), NEW_TOKENS)
    heard = engine.run()
    assert engine.scheduler.stats.preemptions > 0
    assert engine.scheduler.stats.prefix_hit_tokens > 0
    assert engine.scheduler.pool.n_used == 0
    truth = load_truth(checkpoint)
    for key, prompt in enumerate(prompts):
        answer = heard[key].token_ids
        assert len(answer) == NEW_TOKENS
        with torch.inference_mode():
            ids = torch.tensor([prompt + answer])
            logits_QV = truth(ids, past_key_values=Rounded(kv_dtype), use_cache=True).logits[
                0, len(prompt) - 1 : -1
            ]
        behind_Q = logits_QV.amax(1) - logits_QV[torch.arange(NEW_TOKENS), torch.tensor(answer)]
        # A number next to a tie may be stored as its neighbour, which moves logits by so much.
        assert float((behind_Q / logits_QV.std(1)).max()) < 0.02, f"prompt {key} of {len(prompt)} tokens"


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_scores_of_a_prompt_are_those_of_a_cache_rounded_alike_and_not_of_an_exact_one(
    kv_dtype: str, twins_path: Path
) -> None:
    checkpoint, directory = _engine("llama", twins_path)
    engine = LocalEngine(directory, replace(TIGHT, kv_dtype=kv_dtype))
    [prompt] = [prompt for prompt in _prompts() if len(prompt) > 120][:1]
    engine.submit(0, prompt, greedy(VOCAB_SIZE, prompt_logprobs=0), 1)
    found = torch.tensor([entry.logprob for entry in engine.run()[0].prompt_logprobs or []])
    truth, ids = load_truth(checkpoint), torch.tensor([prompt])
    with torch.inference_mode():
        rounded, exact = (
            truth(ids, past_key_values=cache, use_cache=True)
            .logits[0, :-1]
            .log_softmax(-1)
            .gather(1, ids[0, 1:, None])[:, 0]
            for cache in (Rounded(kv_dtype), DynamicCache())
        )
    wrong, lost = (found - rounded).abs(), (exact - rounded).abs()
    assert wrong.median() < 1e-4
    assert wrong.mean() < 0.2 * lost.mean()


@pytest.mark.parametrize("kv_dtype", [None, *FORMATS])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_takes_the_bytes_of_the_plan(family: str, kv_dtype: str | None, twins_path: Path) -> None:
    _, directory = _engine(family, twins_path)
    booted = LocalEngine(directory, replace(TIGHT, kv_dtype=kv_dtype)).booted
    layers: tuple[KvLayer, ...] = booted.runner._kv.layers
    planes = [(layer.k_NPKE, layer.v_NPKE, layer.k_scale_NPK, layer.v_scale_NPK) for layer in layers]
    held = sum(plane.nbytes for layer in planes for plane in layer if plane is not None)
    assert held == booted.plan.memory_bytes("kv_blocks")
    stored = {None: torch.float32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[kv_dtype]
    assert {(layer.k_NPKE.dtype, layer.v_NPKE.dtype) for layer in layers} == {(stored, stored)}
    assert {layer.k_scale_NPK is None for layer in layers} == {kv_dtype is None}
    [reading] = [reading for reading in booted.memory if reading.name == "kv_blocks"]
    assert reading.planned_bytes == held


def test_a_cache_of_16_mib_is_what_the_process_grows_by(twins_path: Path) -> None:
    _, directory = _engine("llama", twins_path)
    for kv_dtype in FORMATS:
        asked = replace(FLOAT32, kv_dtype=kv_dtype, kv_bytes=16 << 20, max_sequences=140, context_tokens=500)
        booted = LocalEngine(directory, asked).booted
        [reading] = [reading for reading in booted.memory if reading.name == "kv_blocks"]
        assert 15 << 20 < reading.planned_bytes <= 16 << 20
        assert reading.measured_bytes is not None
        assert abs(reading.measured_bytes - reading.planned_bytes) < 1 << 20
