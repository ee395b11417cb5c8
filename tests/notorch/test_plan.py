"""The plan: exact bytes for known models, every auto answered, nothing over budget, suggestions that fit."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_models import BOOKS_4M, EXPERTS, LLAMA_8B, LOCAL_GLOBAL

from sailfish.base.config import EngineConfig
from sailfish.base.errors import ConfigError, PlanError
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.checkpoint.names import tensor_specs
from sailfish.hardware.profile import GIB, MIB, PROFILES, HardwareProfile, profile
from sailfish.plan import DeviceOverlay, make_plan, suggest
from sailfish.plan.formats import arena_tensors
from sailfish.plan.graphs import decode_buckets
from sailfish.plan.memory import weights_bytes
from sailfish.plan.ops import choose_ops, launches_saved
from sailfish.plan.render import as_data, decision_rows, memory_rows
from sailfish.plan.strict import refuse_downgrades
from sailfish.plan.types import Decision, Plan, WeightFormats

H200 = profile("h200")
RTX_3090 = profile("sm_86")
CPU = profile("cpu")
FIXED = ("weights", "activations", "workspaces", "runtime", "margin", "graphs")


def with_free(hardware: HardwareProfile, free_bytes: int) -> HardwareProfile:
    """Return the hardware with that much free memory."""
    return replace(hardware, free_bytes=free_bytes, memory_bytes=max(free_bytes, hardware.memory_bytes))


def test_llama_8b_weighs_its_published_number_of_parameters_twice_over_in_bfloat16() -> None:
    plan = make_plan(EngineConfig(), LLAMA_8B, H200)
    assert plan.dtype == "bfloat16"
    assert plan.memory_bytes("weights") == 2 * 8_030_261_248


def test_llama_8b_takes_128_kib_of_kv_blocks_a_token() -> None:
    plan = make_plan(EngineConfig(), LLAMA_8B, H200)
    assert [spec.bytes_per_token for spec in plan.cache] == [128 * 1024]
    assert plan.memory_bytes("kv_blocks") == plan.n_blocks * plan.page_tokens * 128 * 1024


def test_the_arena_starts_every_tensor_at_256_bytes() -> None:
    odd = replace(BOOKS_4M, d_model=250, n_heads=5, n_kv_heads=5, head_dim=50, d_mlp=7, vocab_size=11)
    specs = tensor_specs(odd)
    sizes = []
    for spec in specs:
        n_elements = 1
        for dim in spec.shape:
            n_elements *= dim
        sizes.append((n_elements * 2 + 255) // 256 * 256)
    assert weights_bytes(arena_tensors(odd, WeightFormats()), "bfloat16") == sum(sizes) > 0


def test_layers_are_grouped_by_their_window_and_the_plan_says_that_windows_keep_all_blocks() -> None:
    plan = make_plan(EngineConfig(), LOCAL_GLOBAL, CPU)
    assert [(spec.kind, spec.layers, spec.window_tokens) for spec in plan.cache] == [
        ("window", (0, 2), 512),
        ("full", (1,), None),
    ]
    assert sum(spec.bytes_per_token for spec in plan.cache) == 3 * 2 * 2 * 64 * 4
    assert "window layers keep all blocks" in next(
        line.why for line in plan.memory if line.name == "kv_blocks"
    )


def test_every_setting_of_the_configuration_has_a_decision_with_a_reason() -> None:
    plan = make_plan(EngineConfig(), LLAMA_8B, H200)
    named = {decision.name for decision in plan.decisions}
    assert {field.name for field in fields(EngineConfig)} - {"strict"} <= named
    assert all(decision.why and decision.active for decision in plan.decisions)
    assert all(decision.requested in ("auto", "on") for decision in plan.decisions)


def test_what_was_asked_for_stays_as_asked() -> None:
    asked = EngineConfig(
        device="cuda",
        dtype="float32",
        context_tokens=4096,
        max_sequences=7,
        step_tokens=640,
        mixed_tokens=320,
        max_queue=3,
        page_tokens=32,
        lag=0,
        memory_bytes=60 * GIB,
        kv_bytes=1 * GIB,
        prefix_cache=False,
        cuda_graphs=False,
    )
    plan = make_plan(asked, LLAMA_8B, H200)
    for name in (
        "device",
        "dtype",
        "context_tokens",
        "max_sequences",
        "step_tokens",
        "mixed_tokens",
        "max_queue",
        "page_tokens",
    ):
        assert getattr(plan, name) == getattr(asked, name)
    assert (plan.lag, plan.prefix_cache) == (0, False)
    assert plan.memory_bytes("kv_blocks") == 1 * GIB
    assert plan.total_bytes <= 60 * GIB
    assert {d.why for d in plan.decisions if d.requested not in ("auto",)} == {
        "as asked",
        next(d.why for d in plan.decisions if d.name == "kv_bytes"),
    }


def test_answers_wait_about_as_long_for_prompts_on_any_device() -> None:
    """As many tokens as the device computes in 27 ms, in steps of 128, though no fewer than 256."""
    for model, hardware, asked, tokens in (
        (LLAMA_8B, H200, {}, 1152),
        (LLAMA_8B, H200, {"weights": "fp8"}, 1792),
        (LLAMA_8B, profile("sm_80"), {}, 384),
        (LLAMA_8B, profile("sm_86"), {}, 256),
        (LLAMA_8B, H200, {"step_tokens": 300}, 300),
        (LLAMA_8B, H200, {"dtype": "float32"}, 512),
        (LLAMA_8B, replace(H200, bf16_flops_per_s=None), {}, 512),
        (BOOKS_4M, H200, {}, 8192),
        (BOOKS_4M, CPU, {}, 512),
    ):
        plan = make_plan(EngineConfig(**asked), model, hardware)
        assert plan.mixed_tokens == tokens, next(d for d in plan.decisions if d.name == "mixed_tokens")


def test_a_mixed_step_is_planned_no_longer_than_any_step_and_says_so() -> None:
    config = EngineConfig(step_tokens=640, mixed_tokens=1024)
    plan = make_plan(config, LLAMA_8B, H200)
    decision = next(d for d in plan.decisions if d.name == "mixed_tokens")
    assert plan.mixed_tokens == 640 == max(plan.graph_chunks)
    assert (decision.requested, decision.active, decision.is_downgrade) == ("1024", "640", True)
    assert "step_tokens" in decision.why


def test_the_cpu_keeps_small_models_in_float32_and_large_ones_in_bfloat16_where_it_has_instructions() -> None:
    modern = replace(with_free(CPU, 64 * GIB), features=("avx2", "avx512_bf16"))
    assert make_plan(EngineConfig(), BOOKS_4M, modern).dtype == "float32"
    plan = make_plan(EngineConfig(), LLAMA_8B, modern)
    assert plan.dtype == "bfloat16"
    assert "avx512_bf16" in next(d.why for d in plan.decisions if d.name == "dtype")
    old = replace(modern, features=("avx2",))
    assert make_plan(EngineConfig(), LLAMA_8B, old).dtype == "float32"
    assert make_plan(EngineConfig(), LLAMA_8B, with_free(old, 30 * GIB)).dtype == "bfloat16"


def test_float16_checkpoints_run_in_bfloat16_on_a_gpu_and_the_plan_says_why() -> None:
    plan = make_plan(EngineConfig(), replace(LLAMA_8B, dtype="float16"), H200)
    assert plan.dtype == "bfloat16"
    assert "float16" in next(d.why for d in plan.decisions if d.name == "dtype")


def test_the_cpu_takes_a_quarter_of_free_memory_for_kv_blocks_and_no_more_than_it_can_use() -> None:
    small = make_plan(EngineConfig(), BOOKS_4M, CPU)
    assert small.n_blocks == small.max_sequences * small.blocks_per_sequence
    large = make_plan(EngineConfig(dtype="bfloat16"), LLAMA_8B, with_free(CPU, 64 * GIB))
    assert large.memory_bytes("kv_blocks") <= 16 * GIB
    assert large.memory_bytes("kv_blocks") > 15.9 * GIB


def test_a_context_left_to_auto_is_shortened_to_what_fits_and_one_that_was_asked_for_is_refused() -> None:
    plan = make_plan(EngineConfig(), LLAMA_8B, RTX_3090)
    assert plan.context_tokens < LLAMA_8B.context_tokens
    assert "128k" in next(d.why for d in plan.decisions if d.name == "context_tokens")
    longer = EngineConfig(context_tokens=plan.context_tokens + plan.page_tokens)
    with pytest.raises(PlanError):
        make_plan(longer, LLAMA_8B, RTX_3090)


def test_an_automatic_context_is_not_shortened_below_2k_and_the_error_says_what_would_fit() -> None:
    small = with_free(RTX_3090, 18 * GIB + 500 * MIB)
    with pytest.raises(PlanError, match=r"with 2k tokens of context needs .*--step-tokens \d+") as caught:
        make_plan(EngineConfig(), LLAMA_8B, small)
    found = re.search(r"--step-tokens (\d+)", str(caught.value))
    assert found is not None
    assert make_plan(EngineConfig(step_tokens=int(found[1])), LLAMA_8B, small).context_tokens >= 2048


def test_a_long_context_is_not_the_default_of_a_cpu_but_may_be_asked_for() -> None:
    cpu = with_free(profile("cpu"), 200 * GIB)
    plan = make_plan(EngineConfig(), LLAMA_8B, cpu)
    assert plan.context_tokens == 8192
    assert "--ctx" in next(d.why for d in plan.decisions if d.name == "context_tokens")
    assert make_plan(EngineConfig(context_tokens=131072), LLAMA_8B, cpu).context_tokens == 131072


def test_strict_refuses_what_the_device_forces_and_nothing_else() -> None:
    sound = make_plan(EngineConfig(strict=True), LLAMA_8B, H200)
    ops = choose_ops(LLAMA_8B, sound)
    assert refuse_downgrades(EngineConfig(strict=True), sound, ops) == []
    shortened = make_plan(EngineConfig(), LLAMA_8B, with_free(RTX_3090, 20 * GIB))
    halved = make_plan(EngineConfig(), replace(LLAMA_8B, dtype="float16"), H200)
    capped = choose_ops(replace(LLAMA_8B, attention_softcap=50.0, head_dim=72), sound)
    for plan, chosen, words in (
        (shortened, ops, "context_tokens is"),
        (halved, ops, "dtype is bfloat16"),
        (sound, capped, "attention is cuda_math"),
    ):
        assert words in refuse_downgrades(EngineConfig(), plan, chosen)[0]
        with pytest.raises(PlanError, match=words):
            refuse_downgrades(EngineConfig(strict=True), plan, chosen)


def test_a_plan_error_is_one_line_with_figures_and_changes_that_fit() -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(EngineConfig(context_tokens=131072), LLAMA_8B, RTX_3090)
    words = str(caught.value)
    assert "\n" not in words
    assert re.search(r"needs [\d.]+ GiB on NVIDIA GeForce RTX 3090; [\d.]+ GiB may be used", words)
    found = re.search(r"--ctx (\d+)", words)
    assert found is not None
    make_plan(EngineConfig(context_tokens=int(found[1])), LLAMA_8B, RTX_3090)


def test_a_suggested_context_is_the_longest_that_fits() -> None:
    config = EngineConfig(context_tokens=131072)
    longest = next(s for s in suggest(config, LLAMA_8B, RTX_3090) if s.changes[0][0] == "context_tokens")
    tokens = longest.changes[0][1]
    make_plan(EngineConfig(context_tokens=tokens), LLAMA_8B, RTX_3090)
    with pytest.raises(PlanError):
        make_plan(EngineConfig(context_tokens=tokens + 64), LLAMA_8B, RTX_3090)


def test_where_nothing_fits_the_error_says_what_the_weights_need() -> None:
    with pytest.raises(PlanError, match=r"weights alone are 15\.0 GiB"):
        make_plan(EngineConfig(), LLAMA_8B, with_free(RTX_3090, 8 * GIB))


def test_no_change_is_suggested_for_what_fits() -> None:
    assert suggest(EngineConfig(), LLAMA_8B, H200) == []


def test_kv_bytes_too_small_for_one_context_are_refused_with_the_figures() -> None:
    config = EngineConfig(context_tokens=8192, kv_bytes=100 * MIB)
    with pytest.raises(PlanError, match=r"1\.00 GiB of KV blocks for one sequence; kv_bytes allows 100 MiB"):
        make_plan(config, LLAMA_8B, H200)
    fitting = suggest(config, LLAMA_8B, H200)
    assert {s.changes[0] for s in fitting} == {("kv_bytes", None), ("context_tokens", 800)}


def test_memory_beyond_what_is_free_is_refused() -> None:
    with pytest.raises(PlanError, match="memory_bytes 200 GiB exceeds the 140 GiB"):
        make_plan(EngineConfig(memory_bytes=200 * GIB), LLAMA_8B, H200)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "cpu"}, "device 'cpu' was asked for, but the target is 'sm_90'"),
        ({"dtype": "float16"}, "dtype 'float16' is not supported"),
        ({"page_tokens": 24}, "page_tokens 24 is not supported"),
        ({"context_tokens": 131073}, "context_tokens is 131073, outside 2 to 131072"),
        ({"context_tokens": 0}, "context_tokens is 0"),
        ({"max_sequences": 0}, "max_sequences is 0"),
        ({"step_tokens": -1}, "step_tokens is -1"),
        ({"mixed_tokens": 0}, "mixed_tokens is 0"),
        ({"lag": 2}, "lag is 2"),
        ({"kv_bytes": 0}, "kv_bytes is 0"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value(change: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        make_plan(EngineConfig(**change), LLAMA_8B, H200)
    assert caught.value.hint


def test_an_overlay_replaces_the_typical_runtime_by_the_measured_one() -> None:
    overlay = DeviceOverlay(device_key=H200.key, software="torch", runtime_bytes=777 * MIB)
    plan = make_plan(EngineConfig(), LLAMA_8B, H200, overlay)
    line = next(line for line in plan.memory if line.name == "runtime")
    assert (line.bytes, line.why) == (777 * MIB, "measured on this device")


def test_every_op_is_chosen_with_reasons_for_every_target() -> None:
    for row in PROFILES:
        model = LLAMA_8B if row.device == "cuda" else BOOKS_4M
        chosen = {choice.op: choice for choice in choose_ops(model, make_plan(EngineConfig(), model, row))}
        assert all(choice.why for choice in chosen.values())
        expected = "cpu_sdpa" if row.device == "cpu" else "cuda_paged"
        assert chosen["attention"].implementation == expected


def test_a_newer_card_runs_the_code_of_the_newest_known_one_and_an_older_one_is_refused() -> None:
    blackwell = replace(H200, target="sm_100", name="NVIDIA B200")
    plan = make_plan(EngineConfig(), LLAMA_8B, blackwell)
    assert plan.target == "sm_100"
    assert choose_ops(LLAMA_8B, plan)
    with pytest.raises(ConfigError, match="target 'sm_75' is too old"):
        make_plan(EngineConfig(), LLAMA_8B, replace(H200, target="sm_75"))


def test_the_rows_of_a_plan_add_up_and_its_data_is_json() -> None:
    plan = make_plan(EngineConfig(), LLAMA_8B, H200)
    rows = memory_rows(plan)
    assert [row.name for row in rows] == [line.name for line in plan.memory] + ["total"]
    assert next(row.value for row in rows if row.name == "weights") == "15.0 GiB"
    assert any(row.name == "memory_bytes" and row.value.endswith("GiB") for row in decision_rows(plan))
    data = msgspec.json.decode(msgspec.json.encode(as_data(plan)))
    assert data["total_bytes"] == sum(line["bytes"] for line in data["memory"])


MODELS = st.sampled_from([BOOKS_4M, LOCAL_GLOBAL, EXPERTS, LLAMA_8B])
HARDWARE = st.builds(
    with_free, st.sampled_from(PROFILES), st.integers(min_value=64 * MIB, max_value=200 * GIB)
)


def maybe(values: st.SearchStrategy[int]) -> st.SearchStrategy[int | None]:
    """Return the values, or None for "auto"."""
    return st.none() | values


CONFIGS = st.builds(
    EngineConfig,
    dtype=st.sampled_from([None, "float32", "bfloat16"]),
    context_tokens=maybe(st.integers(2, 2048)),
    max_sequences=maybe(st.integers(1, 512)),
    step_tokens=maybe(st.integers(1, 16384)),
    page_tokens=st.sampled_from([None, 8, 16, 64, 256]),
    kv_bytes=maybe(st.integers(1, 8 * GIB)),
    lag=st.sampled_from([None, 0, 1]),
)


def planned(config: EngineConfig, model: object, hardware: HardwareProfile) -> Plan | None:
    """Return the plan, or None where it does not fit."""
    try:
        return make_plan(config, model, hardware)  # type: ignore[arg-type]
    except PlanError:
        return None


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(CONFIGS, MODELS, HARDWARE)
def test_a_plan_never_exceeds_its_budget_and_holds_one_full_context(
    config: EngineConfig, model: object, hardware: HardwareProfile
) -> None:
    plan = planned(config, model, hardware)
    if plan is None:
        return
    budget = int(next(d.active for d in plan.decisions if d.name == "memory_bytes"))
    assert plan.total_bytes <= budget <= hardware.free_bytes
    assert plan.n_blocks >= plan.blocks_per_sequence
    assert all(line.bytes >= 0 and line.why for line in plan.memory)
    if config.kv_bytes is not None:
        assert plan.memory_bytes("kv_blocks") <= config.kv_bytes


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(CONFIGS, MODELS, HARDWARE)
def test_every_suggestion_fits_when_it_is_applied(
    config: EngineConfig, model: object, hardware: HardwareProfile
) -> None:
    for option in suggest(config, model, hardware):  # type: ignore[arg-type]
        applied = replace(config, **dict(option.changes))
        assert applied == option.config
        assert make_plan(applied, model, hardware).total_bytes == option.total_bytes  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    CONFIGS,
    MODELS,
    st.sampled_from(["max_sequences", "step_tokens", "context_tokens"]),
    st.integers(2, 300),
    st.integers(0, 300),
)
def test_asking_for_more_never_plans_fewer_bytes_outside_the_kv_blocks(
    config: EngineConfig, model: object, name: str, small: int, more: int
) -> None:
    roomy = with_free(H200, 2**43)
    config = replace(config, kv_bytes=None, context_tokens=config.context_tokens or 1024)
    less = make_plan(replace(config, **{name: small}), model, roomy)  # type: ignore[arg-type]
    larger = make_plan(replace(config, **{name: small + more}), model, roomy)  # type: ignore[arg-type]
    for line in FIXED:
        assert less.memory_bytes(line) <= larger.memory_bytes(line)


@pytest.mark.parametrize(
    ("weights", "rows", "saved"),
    [
        ("int4", 1, 32 * 2 + 31),  # every layer's norms and activations, but for the first norm
        ("int4", 16, 32),
        ("int4", 256, 32),
        ("fp8", 256, 0),  # what quantises takes the place of what activated
    ],
)
def test_fused_products_save_launches(weights: str, rows: int, saved: int) -> None:
    plan = make_plan(EngineConfig(weights=weights), LLAMA_8B, H200)
    choices = choose_ops(LLAMA_8B, plan)
    assert launches_saved(LLAMA_8B, plan.formats, choices, rows) == saved


def test_planning_is_pure() -> None:
    config = EngineConfig(context_tokens=1024)
    assert make_plan(config, LLAMA_8B, H200) == make_plan(config, LLAMA_8B, H200)


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 100, 256, 300, 1000, 4096])
def test_any_decode_is_padded_little_to_a_captured_one(most: int) -> None:
    buckets = decode_buckets(most)
    assert list(buckets) == sorted(set(buckets)) and (buckets[0], buckets[-1]) == (1, most)
    assert len(buckets) <= 92
    for n in range(1, most + 1):
        padded = next(bucket for bucket in buckets if bucket >= n)
        assert padded - n <= max(7, n // 8)


def test_graphs_are_planned_where_every_op_can_be_captured_and_declined_in_words_elsewhere() -> None:
    def graphs(model: ModelConfig, hardware: HardwareProfile, **asked: object) -> tuple[Plan, Decision]:
        plan = make_plan(EngineConfig(**asked), model, hardware)
        return plan, next(d for d in plan.decisions if d.name == "cuda_graphs")

    plan, decision = graphs(LLAMA_8B, H200, max_sequences=64)
    assert plan.graph_buckets == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert plan.graph_chunks[:3] == (16, 32, 64) and plan.graph_chunks[-2:] == (1536, 2048)
    assert graphs(LLAMA_8B, H200, step_tokens=100)[0].graph_chunks == (16, 32, 64, 100)
    assert 1152 in plan.graph_chunks, "as many as answers wait for"
    assert decision.active == "on" and not decision.is_downgrade
    assert plan.memory_bytes("graphs") > 64 * LLAMA_8B.vocab_size * 4
    for model, hardware, asked, words, is_downgrade in (
        (LLAMA_8B, H200, {"dtype": "float32"}, "attention is cuda_sdpa, whose launches depend", True),
        (EXPERTS, H200, {}, "whose launches depend", True),
        (LLAMA_8B, H200, {"cuda_graphs": False}, "as asked", False),
        (BOOKS_4M, CPU, {}, "the CPU has no launches to save", False),
    ):
        plan, decision = graphs(model, hardware, **asked)
        assert plan.graph_buckets == plan.graph_chunks == () and plan.memory_bytes("graphs") == 0
        assert decision.active == "off" and words in decision.why
        assert decision.is_downgrade == is_downgrade


def test_an_activation_saves_no_launch_where_another_one_quantises_it() -> None:
    plan = make_plan(EngineConfig(weights="int4"), LLAMA_8B, H200)
    downs = tuple((f"layers.{i}.down.weight", "int8") for i in range(32))
    formats = replace(plan.formats, others=downs)
    choices = choose_ops(LLAMA_8B, replace(plan, formats=formats))
    assert launches_saved(LLAMA_8B, formats, choices, 16) == 0
    assert launches_saved(LLAMA_8B, replace(formats, others=downs[:30]), choices, 16) == 2
