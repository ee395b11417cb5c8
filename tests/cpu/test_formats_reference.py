"""Foreign formats against the library that defines them, where it is installed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization.quant_config import QuantizationConfig
from transformers.utils import quantization_config

from sailfish.checkpoint.files import read_json
from sailfish.checkpoint.formats.codec import layer_tensors, quantised_modules, read_linear, write_linear
from sailfish.checkpoint.formats.config import read_quant_config
from sailfish.checkpoint.formats.config_writer import write_quant_config
from sailfish.checkpoint.formats.convert import convert
from sailfish.checkpoint.formats.scheme import LinearScheme, QuantConfig, Rule
from sailfish.checkpoint.formats.tensors import StoredTensor
from sailfish.checkpoint.safetensors_reader import Checkpoint

sys.path.append(str(Path(__file__).parents[1] / "notorch"))

from formats_fixtures import ACTIVATIONS, random_linear

INTERCHANGE = Path(__file__).parents[2].parent / "shared" / "models" / "interchange"
FOLDERS = ("ct-fp8-dynamic", "ct-w4a16-awq-asym", "ct-w4a16-gptq", "ct-w8a8-smoothquant")
TORCH = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}


def library() -> Any:
    """Return compressed-tensors' compressors and its config class."""
    return BaseCompressor, QuantizationConfig


def as_torch(tensor: StoredTensor) -> torch.Tensor:
    found = torch.from_numpy(tensor.array.copy())
    return found.view(TORCH[tensor.dtype]) if tensor.dtype in TORCH else found


def their_weight(compressor: Any, tensors: Any, scheme: LinearScheme, values: dict[str, Any]) -> torch.Tensor:
    their_scheme = next(iter(values.config_groups.values()))
    state = {name: as_torch(tensor) for name, tensor in tensors.items()}
    return compressor.get_value_from_registry(scheme.layout).decompress(state, their_scheme)["weight"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folders_weights_are_those_that_compressed_tensors_restores(folder: str) -> None:
    compressor, config_class = library()
    if not INTERCHANGE.is_dir():
        pytest.skip("shared/models/interchange is not beside this checkout")
    values = read_json(INTERCHANGE / folder / "config.json")["quantization_config"]
    config, theirs = read_quant_config(values, "config.json"), config_class.model_validate(values)
    checkpoint = Checkpoint.open(INTERCHANGE / folder)
    for module in quantised_modules(checkpoint.tensors):
        scheme, tensors = config.scheme_of(module), layer_tensors(checkpoint, module)
        assert scheme is not None
        ours = torch.from_numpy(read_linear(tensors, scheme, module).dequantise())
        truth = their_weight(compressor, tensors, scheme, theirs)
        assert torch.equal(ours.to(truth.dtype), truth), module


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize(
    ("layout", "bits"), [*(("pack-quantized", bits) for bits in range(2, 9)), ("int-quantized", 8)]
)
def test_what_we_write_compressed_tensors_restores_and_would_write_itself(
    layout: Any, bits: int, group: int | None, symmetric: bool
) -> None:
    compressor, config_class = library()
    scheme = LinearScheme(
        layout=layout, bits=bits, strategy="group" if group else "channel", group=group, symmetric=symmetric
    )
    linear = replace(random_linear(scheme, 40, 96, bits), scale_dtype="F32")
    linear.scale_OG[:] = np.abs(linear.scale_OG) + 0.5  # their rounding takes positive scales
    rule = Rule(targets=("Linear",), scheme=scheme)
    written = write_quant_config(QuantConfig(method="compressed-tensors", rules=(rule,), ignore=("lm_head",)))
    theirs = config_class.model_validate(written)
    tensors = write_linear(linear, scheme, "a layer")
    state = {name: as_torch(tensor) for name, tensor in tensors.items()}
    their_scheme = theirs.config_groups["group_0"]
    their_class = compressor.get_value_from_registry(layout)
    restored = their_class.decompress(state, their_scheme)
    assert torch.equal(restored["weight"], torch.from_numpy(linear.dequantise()))
    again = their_class.compress(restored, their_scheme)
    for name, tensor in tensors.items():
        if name != "weight_scale":
            assert torch.equal(again[name], as_torch(tensor)), name


@pytest.mark.parametrize("number", range(len(ACTIVATIONS)))
def test_compressed_tensors_accepts_every_config_that_we_write(number: int) -> None:
    _, config_class = library()
    activations = ACTIVATIONS[number]
    scheme = LinearScheme(
        layout="float-quantized" if activations.kind == "float" else "int-quantized",
        bits=8,
        strategy="channel",
        activations=activations,
    )
    config = QuantConfig(
        method="compressed-tensors",
        rules=(Rule(targets=("re:.*up_proj",), scheme=scheme),),
        ignore=("lm_head",),
        kv_cache=None if activations.strategy == "token" else activations,
    )
    again = config_class.model_validate(write_quant_config(config)).model_dump(mode="json")
    assert read_quant_config(again, "config.json") == config


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "awq"])
def test_transformers_reads_the_configs_that_we_write(layout: Any) -> None:
    scheme = LinearScheme(layout=layout, bits=4, strategy="group", group=64, symmetric=False)
    method: Any = "awq" if layout == "awq" else "gptq"
    ignore = ("in:lm_head", "in:visual") if method == "awq" else ("lm_head",)
    written = write_quant_config(
        QuantConfig(method=method, rules=(Rule(targets=("Linear",), scheme=scheme),), ignore=ignore)
    )
    theirs = (quantization_config.AwqConfig if method == "awq" else quantization_config.GPTQConfig)(
        **{key: value for key, value in written.items() if key != "quant_method"}
    )
    assert (theirs.bits, theirs.group_size) == (4, 64)
    assert theirs.format == ("gemm" if method == "awq" else layout)
    if method == "awq":
        assert theirs.modules_to_not_convert == ["visual"] and theirs.zero_point
    else:
        assert not theirs.sym and not theirs.desc_act


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("folder", ["gptq-w4", "ct-w4a16-gptq"])
def test_transformers_runs_a_checkpoint_that_we_converted(folder: str, tmp_path: Path) -> None:
    if not INTERCHANGE.is_dir():
        pytest.skip("shared/models/interchange is not beside this checkout")
    convert(INTERCHANGE / folder, tmp_path / "first", "gptq_v2", lambda done, total: None)
    config = convert(tmp_path / "first", tmp_path / "out", "pack-quantized", lambda done, total: None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    checkpoint = Checkpoint.open(tmp_path / "out")
    dense = transformers.AutoModelForCausalLM.from_pretrained(
        INTERCHANGE.parent / "books-4m", dtype=torch.float32
    )
    with torch.no_grad():
        for name in checkpoint.tensors:  # norms may have taken up scales
            if name.endswith("norm.weight"):
                dense.get_parameter(name).copy_(as_torch(StoredTensor.from_checkpoint(checkpoint, name)))
        for module in quantised_modules(checkpoint.tensors):
            scheme = config.scheme_of(module)
            assert scheme is not None
            linear = read_linear(layer_tensors(checkpoint, module), scheme, module)
            dense.get_parameter(f"{module}.weight").copy_(torch.from_numpy(linear.dequantise()))
        tokens = torch.arange(1, 65)[None]
        ours, truth = dense(tokens).logits, theirs(tokens).logits
    assert torch.allclose(ours, truth, atol=2e-4)
