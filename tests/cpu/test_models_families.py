"""Every family's twin gives transformers' logits and greedy tokens, past its own edge."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from paged import PagedDriver, without_edge
from torch import Tensor
from twins import TWINS, load_truth, make_twin, write_classic_config

from sailfish.checkpoint.hf_config import load_model_config
from sailfish.kernels.choose import choose
from sailfish.kernels.contract import Ops
from sailfish.plan.ops import op_cases
from sailfish.plan.types import WeightFormats

PROMPT_TOKENS = {0: 150, 1: 83}
NEW_TOKENS = 128

EDGES = [
    ("llama3", "rope scaling"),
    ("llama_linear", "rope scaling"),
    ("llama_yarn", "rope scaling"),
    ("mistral", "window"),
    ("gemma2", "window"),
    ("gemma2", "attention_softcap"),
    ("gemma2", "logit_softcap"),
    ("gemma3_text", "window"),
    ("gemma3_text", "rope scaling"),
]


@pytest.fixture(scope="session")
def twins_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "twins"


def _prompts(seed: int) -> dict[int, list[int]]:
    draw = random.Random(seed)
    return {sequence: [draw.randrange(256) for _ in range(n)] for sequence, n in PROMPT_TOKENS.items()}


@torch.inference_mode()
def _true_logits(path: Path, tokens: list[int]) -> Tensor:
    logits_QV: Tensor = load_truth(path)(torch.tensor([tokens])).logits[0]
    return logits_QV


def _true_greedy(path: Path, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    generated = load_truth(path).generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
    )
    tokens: list[int] = generated[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("family", TWINS)
def test_a_twin_gives_the_logits_and_greedy_tokens_of_transformers(family: str, twins_path: Path) -> None:
    path = make_twin(family, twins_path)
    prompts = _prompts(1)
    driver = PagedDriver(path, seed=2)
    logits = driver.prefill(prompts, largest_chunk=70)
    for sequence, prompt in prompts.items():
        torch.testing.assert_close(logits[sequence], _true_logits(path, prompt), atol=1e-4, rtol=0)
    tokens = driver.greedy({s: int(logits_QV[-1].argmax()) for s, logits_QV in logits.items()}, NEW_TOKENS)
    for sequence, prompt in prompts.items():
        assert tokens[sequence] == _true_greedy(path, prompt)
        assert len(set(tokens[sequence])) > 10, "the text says too little to compare"


@pytest.mark.parametrize(("family", "edge"), EDGES)
def test_the_prompts_cross_the_edge_of_their_family(family: str, edge: str, twins_path: Path) -> None:
    path = make_twin(family, twins_path)
    config = without_edge(load_model_config(path), edge)
    prompts = _prompts(1)
    logits = PagedDriver(path, seed=2, config=config).prefill(prompts, largest_chunk=200)
    assert (logits[0] - _true_logits(path, prompts[0])).abs().max() > 0.05


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen3_moe_normalised"])
def test_the_routers_of_the_twins_come_near_to_a_tie(family: str, twins_path: Path) -> None:
    path = make_twin(family, twins_path)
    gaps: list[Tensor] = []

    def watching(ops: Ops) -> Ops:
        def watch(x_TD: Tensor, router_TX: Tensor, *rest: Any) -> Tensor:
            best_TA = router_TX.topk(rest[2] + 1, -1).values
            gaps.append(best_TA[:, -2] - best_TA[:, -1])
            return ops.moe(x_TD, router_TX, *rest)

        return replace(ops, moe=watch)

    PagedDriver(path, seed=0, wrap_ops=watching).prefill(_prompts(1), largest_chunk=200)
    assert 1e-5 < torch.cat(gaps).min() < 5e-3, "near, yet further apart than float32's rounding"


@pytest.mark.parametrize("family", TWINS)
def test_both_forms_of_config_mean_the_same_model(family: str, twins_path: Path, tmp_path: Path) -> None:
    path = make_twin(family, twins_path)
    assert load_model_config(write_classic_config(path, tmp_path)) == load_model_config(path)


def test_weights_stored_in_half_the_bits_are_widened_exactly(twins_path: Path) -> None:
    path = make_twin("mixtral", twins_path, dtype=torch.bfloat16)
    prompts = _prompts(5)
    logits = PagedDriver(path, seed=6).prefill(prompts, largest_chunk=40)
    torch.testing.assert_close(logits[0], _true_logits(path, prompts[0]), atol=1e-4, rtol=0)


def test_a_bfloat16_decoder_errs_no_more_than_transformers_does(twins_path: Path) -> None:
    path = make_twin("llama", twins_path)
    prompt = _prompts(8)[0]
    truth_QV = _true_logits(path, prompt)
    with torch.inference_mode():
        theirs_QV = load_truth(path, torch.bfloat16)(torch.tensor([prompt])).logits[0].float()
    ours_QV = PagedDriver(path, seed=7, dtype="bfloat16").prefill({0: prompt}, largest_chunk=40)[0]
    assert (ours_QV - truth_QV).norm() < 1.1 * (theirs_QV - truth_QV).norm()


def test_a_model_with_softcap_is_told_why_it_has_no_sdpa(twins_path: Path) -> None:
    config = load_model_config(make_twin("gemma2", twins_path))
    cases = op_cases(
        config, target="sm_90", dtype="bfloat16", kv_dtype="bfloat16", page_tokens=64, formats=WeightFormats()
    )
    choice = next(choose(case) for case in cases if case.op == "attention")
    assert choice.implementation == "cuda_math"
    reasons = dict(choice.declined)
    assert reasons["cuda_sdpa"] == "SDPA has no score soft-cap, the model needs 5"
    assert reasons["cpu_sdpa"] == "made for the CPU, the target is sm_90"
