"""Tensor names and shapes: every family's checkpoint is accepted whole, and nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from checkpoint_fixtures import base_config, write_checkpoint, write_json

from sailfish.base.errors import CheckpointError, UnsupportedModelError
from sailfish.checkpoint.families import FAMILIES
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.checkpoint.names import check_tensors, tensor_specs
from sailfish.checkpoint.safetensors_reader import Checkpoint

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def load(directory: Path, model_type: str = "llama", **extra: Any) -> ModelConfig:
    write_json(directory / "config.json", base_config(model_type, **extra))
    return load_model_config(directory)


def tensors_of(config: ModelConfig, dtype: str = "F32") -> Shapes:
    return {
        source: (dtype, shape)
        for spec in tensor_specs(config)
        for source, shape in zip(spec.sources, spec.source_shapes, strict=True)
    }


def check(directory: Path, config: ModelConfig, tensors: Shapes) -> None:
    check_tensors(config, Checkpoint.open(write_checkpoint(directory, tensors)))


def refusal(directory: Path, config: ModelConfig, tensors: Shapes) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        check(directory, config, tensors)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_sources_fill_each_tensor_exactly(tmp_path: Path, model_type: str) -> None:
    specs = tensor_specs(load(tmp_path, model_type))
    assert len({spec.name for spec in specs}) == len(specs)
    sources = [source for spec in specs for source in spec.sources]
    assert len(set(sources)) == len(sources)
    for spec in specs:
        assert math.prod(spec.shape) == sum(map(math.prod, spec.source_shapes))
        assert {shape[-1] for shape in spec.source_shapes if len(shape) > 1} <= {spec.shape[-1]}


def test_query_key_and_value_rows_follow_one_another(tmp_path: Path) -> None:
    specs = {spec.name: spec for spec in tensor_specs(load(tmp_path, "qwen2"))}
    assert specs["layers.1.qkv.weight"].shape == (64, 32)
    assert specs["layers.1.qkv.weight"].sources == tuple(
        f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"
    )
    assert specs["layers.1.qkv.bias"].source_shapes == ((32,), (16,), (16,))
    assert specs["layers.0.gate_up.weight"].sources == (
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    )


@pytest.mark.parametrize(("family", "d_mlp", "run"), [("llama", 48, 8), ("glm4", 48, 8), ("llama", 44, 0)])
def test_gate_and_up_take_turns_of_eight_rows_where_eight_divides_them(
    tmp_path: Path, family: str, d_mlp: int, run: int
) -> None:
    specs = tensor_specs(load(tmp_path, family, intermediate_size=d_mlp, mlp_bias=True))
    runs = {spec.name.split(".")[-2]: spec.run for spec in specs if spec.name.startswith("layers.0.")}
    assert runs.pop("gate_up") == run and set(runs.values()) == {0}


def test_experts_follow_one_another_with_gate_before_up(tmp_path: Path) -> None:
    specs = {spec.name: spec for spec in tensor_specs(load(tmp_path, "mixtral"))}
    assert specs["layers.0.experts.gate_up.weight"].shape == (4, 96, 32)
    assert specs["layers.0.experts.gate_up.weight"].sources[:3] == (
        "model.layers.0.block_sparse_moe.experts.0.w1.weight",
        "model.layers.0.block_sparse_moe.experts.0.w3.weight",
        "model.layers.0.block_sparse_moe.experts.1.w1.weight",
    )
    assert specs["layers.0.router.weight"].sources == ("model.layers.0.block_sparse_moe.gate.weight",)


def test_glm4_keeps_its_fused_rows_and_its_own_norm_names(tmp_path: Path) -> None:
    specs = {spec.name: spec.sources for spec in tensor_specs(load(tmp_path, "glm4"))}
    assert specs["layers.0.gate_up.weight"] == ("model.layers.0.mlp.gate_up_proj.weight",)
    assert specs["layers.0.attn_post_norm.weight"] == ("model.layers.0.post_self_attn_layernorm.weight",)
    assert specs["layers.0.mlp_norm.weight"] == ("model.layers.0.post_attention_layernorm.weight",)
    assert specs["layers.0.mlp_post_norm.weight"] == ("model.layers.0.post_mlp_layernorm.weight",)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_float_checkpoints_pass(tmp_path: Path, dtype: str) -> None:
    config = load(tmp_path)
    check(tmp_path, config, tensors_of(config, dtype))


def test_a_tied_head_may_be_stored_and_old_buffers_are_ignored(tmp_path: Path) -> None:
    config = load(tmp_path, tie_word_embeddings=True)
    extra: Shapes = {
        "lm_head.weight": ("F32", (64, 32)),
        "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (4,)),
    }
    check(tmp_path, config, tensors_of(config) | extra)
    assert "head.weight" not in {spec.name for spec in tensor_specs(config)}


NAME = "model.layers.1.self_attn.k_proj.weight"


def test_a_missing_tensor_is_named_with_its_shape(tmp_path: Path) -> None:
    config = load(tmp_path)
    tensors = tensors_of(config)
    del tensors[NAME]
    assert f"lacks tensor {NAME} of shape [16, 32]" in str(refusal(tmp_path, config, tensors))


def test_a_misshapen_tensor_is_named_with_file_and_both_shapes(tmp_path: Path) -> None:
    config = load(tmp_path)
    message = str(refusal(tmp_path, config, tensors_of(config) | {NAME: ("F32", (32, 16))}))
    assert f"model.safetensors: tensor {NAME} has shape [32, 16], config.json asks for [16, 32]" in message


def test_an_integer_tensor_is_named_with_its_dtype(tmp_path: Path) -> None:
    config = load(tmp_path)
    error = refusal(tmp_path, config, tensors_of(config) | {NAME: ("I32", (16, 32))})
    assert isinstance(error, UnsupportedModelError) and "has dtype I32; supported are F32" in str(error)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.self_attn.q_proj.bias", "ignoring it would change the output"),
        ("model.layers.2.self_attn.q_proj.weight", "no place in a llama model of 2 layers"),
        ("model.layers.0.self_attn.q_proj.weight_scale", "is quantised"),
        ("score.weight", "no place in a llama model"),
    ],
)
def test_a_tensor_that_would_be_ignored_is_refused(tmp_path: Path, name: str, words: str) -> None:
    config = load(tmp_path)
    error = refusal(tmp_path, config, tensors_of(config) | {name: ("F32", (32,))})
    assert isinstance(error, UnsupportedModelError) and words in str(error) and name in str(error)


def test_a_quantised_tensor_in_place_of_a_weight_is_named(tmp_path: Path) -> None:
    config = load(tmp_path)
    tensors = tensors_of(config)
    del tensors[NAME]
    tensors[NAME.replace("weight", "qweight")] = ("I32", (4, 16))
    error = refusal(tmp_path, config, tensors)
    assert isinstance(error, UnsupportedModelError) and "k_proj.qweight'" in str(error)
