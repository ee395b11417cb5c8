"""Formats of weights: what each costs to the byte, what is asked and answered, its place in the cache."""

from __future__ import annotations

import shutil
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
from engine_fixtures import write_checkpoint
from plan_models import BOOKS_4M, EXPERTS, LLAMA_8B

from sailfish.base.config import EngineConfig
from sailfish.base.errors import ConfigError, PlanError
from sailfish.build.cache import _entry_name
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.hardware.profile import profile
from sailfish.plan import make_plan, suggest
from sailfish.plan.formats import arena_tensors, config_of, formats_of, words
from sailfish.plan.types import WeightFormats

LLAMA_7B = replace(LLAMA_8B, n_heads=32, n_kv_heads=32, d_mlp=11008, vocab_size=32000, context_tokens=4096)


def _weights_bytes(config: EngineConfig, model: ModelConfig) -> int:
    return make_plan(config, model, profile("h200")).memory_bytes("weights")


def test_a_7b_model_in_four_bits_takes_less_than_3_88_gb_and_3_65_with_head_and_embedding_in_eight() -> None:
    int4 = EngineConfig(weights="int4")
    assert 3.8e9 < _weights_bytes(int4, LLAMA_7B) <= 3.88e9
    assert 3.5e9 < _weights_bytes(replace(int4, head="int8", embedding="int8"), LLAMA_7B) <= 3.65e9
    assert _weights_bytes(int4, LLAMA_7B) <= 0.29 * _weights_bytes(EngineConfig(), LLAMA_7B)


@pytest.mark.parametrize(("format", "bits"), [("int4", 4.125), ("int8", 8.01), ("fp8", 8.01)])
def test_every_format_takes_its_bits_for_each_weight(format: str, bits: float) -> None:
    plain = {t.name: prod(t.shape) for t in arena_tensors(LLAMA_8B, WeightFormats())}
    formats = formats_of(EngineConfig(weights=format, head=format), LLAMA_8B)
    stored = {t.name: t.n_bytes("bfloat16") for t in arena_tensors(LLAMA_8B, formats)}
    for name, n_weights in plain.items():
        if name.endswith("norm.weight") or name == "embed.weight":
            assert stored[name] == 2 * n_weights
        else:
            n_bytes = sum(size for part, size in stored.items() if part.startswith(f"{name}."))
            assert 8 * n_bytes / n_weights == pytest.approx(bits, rel=0.002)


def test_narrow_weights_are_padded_to_whole_tiles() -> None:
    odd = replace(BOOKS_4M, d_model=70, n_heads=3, n_kv_heads=1, head_dim=10, d_mlp=100, vocab_size=50)
    formats = WeightFormats(layers="int4", group=32)
    shapes = {tensor.name: tensor.shape for tensor in arena_tensors(odd, formats)}
    assert shapes["layers.0.qkv.weight.packed"] == (4, 2, 32, 4)  # 50 x 70 becomes 64 x 128
    assert shapes["layers.0.qkv.weight.scale"] == (4, 4, 16)
    assert shapes["layers.0.o.weight.packed"] == (8, 1, 32, 4)  # 70 x 30 becomes 128 x 64,
    assert shapes["layers.0.o.weight.scale"] == (8, 1, 16)  # one group, which holds the whole row


def test_only_attention_and_dense_mlps_are_quantised() -> None:
    formats = WeightFormats(layers="int8")
    plain = {tensor.name for tensor in arena_tensors(EXPERTS, formats) if tensor.dtype is None}
    kinds = {
        name.partition(".")[2].partition(".")[2] if name.startswith("layers") else name for name in plain
    }
    assert kinds == {
        "embed.weight", "final_norm.weight", "attn_norm.weight", "mlp_norm.weight", "router.weight",
        "experts.gate_up.weight", "experts.down.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "names", "head"),
    [
        (EngineConfig(weights="int4"), {"embed.weight"}, "plain"),
        (EngineConfig(head="int8"), {"embed.weight", "head.weight.values", "head.weight.scale"}, "int8"),
        (EngineConfig(embedding="int8"), {"embed.weight.values", "embed.weight.scale"}, "int8"),
        (EngineConfig(embedding="int8", head="int8"), {"embed.weight.values", "embed.weight.scale"}, "int8"),
        (
            EngineConfig(embedding="int8", head="plain"),
            {"embed.weight.values", "embed.weight.scale", "head.weight"},
            "plain",
        ),
    ],
)
def test_a_tied_head_is_a_weight_of_its_own_only_in_another_format(
    config: EngineConfig, names: set[str], head: str
) -> None:
    assert BOOKS_4M.tied_head
    formats = formats_of(config, BOOKS_4M)
    found = {tensor.name for tensor in arena_tensors(BOOKS_4M, formats)}
    assert {name for name in found if name.startswith(("embed", "head"))} == names
    assert formats.head == head


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(),
        EngineConfig(weights="int4", weight_group=64),
        EngineConfig(weights="fp8", head="int4", embedding="int8", weight_group=32),
    ],
)
def test_formats_and_the_settings_that_ask_for_them_are_inverse(config: EngineConfig) -> None:
    formats = formats_of(config, LLAMA_8B)
    assert config_of(formats) == config
    assert formats_of(config_of(formats), LLAMA_8B) == formats


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (EngineConfig(weights="int3"), "weights 'int3' is not supported"),
        (EngineConfig(head="bfloat16"), "head 'bfloat16' is not supported"),
        (EngineConfig(embedding="int4"), "embedding 'int4' is not supported"),
        (EngineConfig(weights="int4", weight_group=100), "weight_group 100 is not supported"),
        (
            EngineConfig(weights="float32", dtype="bfloat16"),
            "cannot be multiplied with activations in bfloat16",
        ),
    ],
)
def test_a_format_that_does_not_exist_is_refused(config: EngineConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_plan(config, LLAMA_8B, profile("h200"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plain_dtype_of_weights_is_the_activations_too(dtype: str) -> None:
    plan = make_plan(EngineConfig(weights=dtype), BOOKS_4M, profile("h200"))
    assert plan.dtype == dtype and plan.formats == WeightFormats()
    assert not any(decision.is_downgrade and decision.name == "dtype" for decision in plan.decisions)


def test_the_plan_says_what_is_stored_in_what_and_why() -> None:
    plan = make_plan(EngineConfig(weights="int4", head="int8"), LLAMA_8B, profile("h200"))
    decisions = {decision.name: decision for decision in plan.decisions}
    assert decisions["weights"].active == "int4 (groups of 128)" and decisions["weights"].requested == "int4"
    assert decisions["head"].active == "int8"
    assert decisions["embedding"].active == "bfloat16" and decisions["embedding"].requested == "auto"
    line = next(line for line in plan.memory if line.name == "weights")
    assert line.why == "one arena: int4 (groups of 128), int8 head, the rest in bfloat16"
    assert words(WeightFormats()) == "plain"


def test_engines_of_other_formats_lie_elsewhere_in_the_cache(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny")
    entries = {
        _entry_name(checkpoint, "cpu", formats)
        for formats in (
            WeightFormats(),
            WeightFormats(layers="int4"),
            WeightFormats(layers="int4", group=64),
            WeightFormats(layers="int8"),
            WeightFormats(head="int8"),
            WeightFormats(embedding="int8"),
        )
    }
    assert len(entries) == 6
    shutil.rmtree(checkpoint)


def test_a_model_that_does_not_fit_is_told_the_formats_that_do() -> None:
    small = replace(profile("rtx 3090"), free_bytes=14 * 1024**3)
    config = EngineConfig(context_tokens=4096, max_sequences=4, step_tokens=512)
    with pytest.raises(PlanError) as caught:
        make_plan(config, LLAMA_8B, small)
    assert "--weights int8 (" in str(caught.value.hint) and "--weights int4 (" in str(caught.value.hint)
    for option in suggest(config, LLAMA_8B, small):
        assert make_plan(option.config, LLAMA_8B, small).total_bytes == option.total_bytes
