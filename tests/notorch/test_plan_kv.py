"""A KV cache in 8 bits: what is asked, what the plan counts for it, and what that buys."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from plan_models import BOOKS_4M, LLAMA_8B, LOCAL_GLOBAL

from sailfish.base.config import EngineConfig
from sailfish.base.errors import ConfigError, PlanError
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.engine.kv.prefix import root_hash
from sailfish.hardware.profile import GIB, PROFILES, HardwareProfile, profile
from sailfish.plan import make_plan
from sailfish.plan.ops import choose_ops
from sailfish.plan.strict import refuse_downgrades
from sailfish.plan.types import Plan

H200 = profile("h200")
CPU = profile("cpu")


def plan_of(kv_dtype: str | None, model: ModelConfig = LLAMA_8B, **asked: int) -> Plan:
    return make_plan(EngineConfig(kv_dtype=kv_dtype, **asked), model, H200)


def kv_decision(plan: Plan) -> tuple[str, str, str]:
    [decision] = [decision for decision in plan.decisions if decision.name == "kv_dtype"]
    assert not decision.is_downgrade
    return decision.requested, decision.active, decision.why


def test_a_cache_is_exact_unless_8_bits_are_asked_for() -> None:
    assert kv_decision(plan_of(None)) == ("auto", "bfloat16", "as the activations: exact")
    assert kv_decision(make_plan(EngineConfig(), BOOKS_4M, CPU))[1] == "float32"
    for kv_dtype in ("int8", "fp8"):
        assert kv_decision(plan_of(kv_dtype)) == (kv_dtype, kv_dtype, "as asked")
        assert plan_of(kv_dtype).kv_dtype == kv_dtype
        assert plan_of(kv_dtype).dtype == "bfloat16"
    assert make_plan(EngineConfig(dtype="float32", kv_dtype="float32"), LLAMA_8B, H200).kv_dtype == "float32"


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_token_takes_a_byte_an_element_and_four_a_head_for_its_scale(kv_dtype: str) -> None:
    plan = plan_of(kv_dtype)
    # Llama-3.1-8B: 32 layers of keys and values, 8 heads each, of 128 elements.
    assert [spec.bytes_per_token for spec in plan.cache] == [32 * 2 * 8 * (128 + 4)]
    assert [spec.dtype for spec in plan.cache] == [kv_dtype]
    assert plan.memory_bytes("kv_blocks") == plan.n_blocks * plan.page_tokens * 67_584
    assert [spec.bytes_per_token for spec in plan_of(kv_dtype, LOCAL_GLOBAL).cache] == [2 * 272, 272]


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_the_same_memory_holds_nearly_twice_the_tokens(kv_dtype: str) -> None:
    exact, rounded = (plan_of(each, kv_bytes=40 * GIB) for each in (None, kv_dtype))
    assert rounded.n_blocks == 40 * GIB // (16 * 67_584)
    assert rounded.n_blocks / exact.n_blocks == pytest.approx(256 / 132, rel=1e-3)
    longer = EngineConfig(kv_dtype=kv_dtype, context_tokens=131072, kv_bytes=9 * GIB)
    assert make_plan(longer, LLAMA_8B, H200).context_tokens == 131072
    with pytest.raises(PlanError, match=r"16\.0 GiB of KV blocks for one sequence"):
        make_plan(replace(longer, kv_dtype=None), LLAMA_8B, H200)


def test_weights_and_activations_stay_as_they_are() -> None:
    exact, rounded = plan_of(None), plan_of("int8")
    assert exact.memory_bytes("weights") == rounded.memory_bytes("weights")
    assert exact.memory_bytes("activations") == rounded.memory_bytes("activations")
    assert exact.formats == rounded.formats


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("hardware", PROFILES, ids=lambda row: row.target)
def test_8_bits_are_no_downgrade_on_any_target(hardware: HardwareProfile, kv_dtype: str) -> None:
    model = LLAMA_8B if hardware.device == "cuda" else BOOKS_4M
    asked = EngineConfig(kv_dtype=kv_dtype, strict=True, context_tokens=2048)
    plan = make_plan(asked, model, hardware)
    chosen = choose_ops(model, plan)
    assert refuse_downgrades(asked, plan, chosen) == []
    [attention] = [choice.implementation for choice in chosen if choice.op == "attention"]
    assert attention == ("cuda_paged" if hardware.device == "cuda" else "cpu_sdpa")


def test_heads_that_the_kernels_cannot_read_in_8_bits_are_attended_to_otherwise_and_explain_says_why() -> (
    None
):
    odd = replace(LLAMA_8B, head_dim=80, d_model=32 * 80)
    found = {}
    for kv_dtype in (None, "int8"):
        plan = plan_of(kv_dtype, odd)
        [found[kv_dtype]] = [choice for choice in choose_ops(odd, plan) if choice.op == "attention"]
    assert found[None].implementation == "cuda_paged"
    assert found["int8"].implementation == "cuda_sdpa"
    assert "8-bit cache needs heads of a multiple of 32" in dict(found["int8"].declined)["cuda_paged"]


@pytest.mark.parametrize(
    "asked",
    [
        EngineConfig(kv_dtype="int4"),
        EngineConfig(kv_dtype="float16"),
        EngineConfig(kv_dtype="fp8_e5m2"),
        EngineConfig(kv_dtype="float32", dtype="bfloat16"),
        EngineConfig(kv_dtype="bfloat16"),
    ],
    ids=str,
)
def test_other_formats_are_refused_in_words(asked: EngineConfig) -> None:
    words = re.escape(f"kv_dtype {asked.kv_dtype!r} is not supported")
    with pytest.raises(ConfigError, match=words) as caught:
        make_plan(asked, LLAMA_8B, H200)
    assert caught.value.param == "kv_dtype"
    assert 'use "int8" or "fp8"' in str(caught.value.hint)


def test_prefixes_in_other_formats_are_never_taken_for_each_other() -> None:
    roots = {root_hash("digest", kv_dtype, "", "") for kv_dtype in ("float32", "bfloat16", "int8", "fp8")}
    assert len(roots) == 4
