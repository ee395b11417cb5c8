"""Whole folders that llm-compressor and GPTQModel wrote: every layer is read, then written to the byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sailfish.base.errors import CheckpointError
from sailfish.checkpoint.files import read_json
from sailfish.checkpoint.formats.codec import (
    layer_tensors,
    quantised_modules,
    read_linear,
    rejects,
    schemes_of,
    write_linear,
)
from sailfish.checkpoint.formats.config import read_quant_config
from sailfish.checkpoint.formats.linear import QuantisedLinear
from sailfish.checkpoint.formats.scheme import LinearScheme, QuantConfig
from sailfish.checkpoint.formats.tensors import StoredTensor
from sailfish.checkpoint.safetensors_reader import Checkpoint

MODELS = Path(__file__).parents[2].parent / "shared" / "models"
FOLDERS = (
    "ct-fp8-dynamic", "ct-w4a16-awq-asym", "ct-w4a16-gptq", "ct-w8a8-smoothquant", "gptq-w4",
    "gptq-w4-actorder",
)  # fmt: skip
LINEARS = [
    f"model.layers.{layer}.{part}_proj"
    for layer in range(2)
    for part in ("mlp.down", "mlp.gate", "mlp.up", "self_attn.k", "self_attn.o", "self_attn.q", "self_attn.v")
]
ERROR = {"ct-fp8-dynamic": 0.03, "ct-w8a8-smoothquant": 0.02}
"""The most that a layer may be off its parent, as a share of it; 4-bit layers may be by what follows."""
ERROR_4_BIT = 0.2
FOLDED = ("ct-w8a8-smoothquant", "ct-w4a16-awq-asym")
"""Written with scales folded into the weights, which then are not the parent's."""


def opened(folder: str) -> tuple[Checkpoint, QuantConfig]:
    directory = MODELS / "interchange" / folder
    if not directory.is_dir():
        pytest.skip("shared/models/interchange is not beside this checkout")
    config = read_json(directory / "config.json")["quantization_config"]
    return Checkpoint.open(directory), read_quant_config(config, "config.json")


def scheme_of(config: QuantConfig, module: str) -> LinearScheme:
    scheme = config.scheme_of(module)
    assert scheme is not None
    return scheme


def read(checkpoint: Checkpoint, config: QuantConfig, module: str) -> QuantisedLinear:
    return read_linear(layer_tensors(checkpoint, module), scheme_of(config, module), module)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_names_its_quantised_linears_and_no_other(folder: str) -> None:
    checkpoint, config = opened(folder)
    assert quantised_modules(checkpoint.tensors) == sorted(LINEARS)
    found = schemes_of(config, [*LINEARS, "lm_head"], checkpoint.tensors)
    assert found.pop("lm_head") is None
    assert None not in found.values()
    assert {scheme.act_order for scheme in found.values() if scheme} == {folder == "gptq-w4-actorder"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_layer_of_a_folder_is_written_again_to_the_byte(folder: str) -> None:
    checkpoint, config = opened(folder)
    for module in LINEARS:
        scheme, tensors = scheme_of(config, module), layer_tensors(checkpoint, module)
        linear = read_linear(tensors, scheme, module)
        assert dict(write_linear(linear, scheme, module)) == tensors
        assert (linear.zero_OG is None) is ("asym" not in folder)


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_layer_of_a_folder_is_near_its_parent(folder: str) -> None:
    checkpoint, config = opened(folder)
    parent = Checkpoint.open(MODELS / "books-4m")
    for module in LINEARS:
        weight = read(checkpoint, config, module).dequantise().astype(np.float64)
        truth = StoredTensor.from_checkpoint(parent, f"{module}.weight").floats().astype(np.float64)
        if folder in FOLDED:  # each row points the same way, as far as the folded scales leave it
            cosine = (weight * truth).sum() / (np.linalg.norm(weight) * np.linalg.norm(truth))
            assert cosine > 0.9, module
        else:
            error = np.linalg.norm(weight - truth) / np.linalg.norm(truth)
            assert error < ERROR.get(folder, ERROR_4_BIT), module


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_a_folder_holds_passes_through_the_formats_that_can_hold_it(folder: str) -> None:
    checkpoint, config = opened(folder)
    module = LINEARS[0]
    linear = read(checkpoint, config, module)
    taken = 0
    for other in FOLDERS:
        _, other_config = opened(other)
        scheme = scheme_of(other_config, module)
        if rejects(linear, scheme) is None:
            through = read_linear(write_linear(linear, scheme, module), scheme, module)
            assert np.array_equal(through.dequantise(), linear.dequantise())
            taken += 1
    assert taken == {"ct-w4a16-gptq": 4, "gptq-w4": 4, "ct-w4a16-awq-asym": 1}.get(folder, 1)


def test_config_and_tensors_that_disagree_are_refused() -> None:
    checkpoint, config = opened("ct-w4a16-gptq")
    with pytest.raises(CheckpointError, match="lm_head has weight_packed, but"):
        schemes_of(config, ["lm_head"], ["lm_head.weight_packed"])
    with pytest.raises(CheckpointError, match="is dense, but"):
        schemes_of(config, [LINEARS[0]], [f"{LINEARS[0]}.weight"])
    with pytest.raises(CheckpointError, match="holds no tensor of 'model.nothing'"):
        layer_tensors(checkpoint, "model.nothing")
