"""Checkpoints rewritten in another format: the same weights, in files that the safetensors library reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats_fixtures import random_linear
from safetensors import deserialize

from sailfish.base.errors import CheckpointError, ConfigError
from sailfish.checkpoint.files import read_json
from sailfish.checkpoint.formats.codec import layer_tensors, quantised_modules, read_linear, write_linear
from sailfish.checkpoint.formats.config import read_quant_config
from sailfish.checkpoint.formats.config_writer import write_quant_config
from sailfish.checkpoint.formats.convert import convert, layout_of, restore
from sailfish.checkpoint.formats.scheme import ActivationScheme, Layout, LinearScheme, QuantConfig, Rule
from sailfish.checkpoint.formats.tensors import FloatType, StoredTensor
from sailfish.checkpoint.formats.writer import CheckpointWriter
from sailfish.checkpoint.safetensors_reader import Checkpoint

INTERCHANGE = Path(__file__).parents[2].parent / "shared" / "models" / "interchange"
UP, ROUTER, NORM = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate", "model.norm"
SCHEME = LinearScheme(layout="pack-quantized", bits=4, strategy="group", group=32)


def small(directory: Path, scheme: LinearScheme = SCHEME, head: bool = False) -> Path:
    """Write a checkpoint of one quantised layer, with a bias, beside a dense router and a norm."""
    method = "gptq" if scheme.layout.startswith("gptq") else "awq" if scheme.layout == "awq" else None
    rule = Rule(targets=("Linear",), scheme=scheme)
    ignore = ("in:lm_head",) if method == "awq" else ("lm_head",)
    if method is None:
        ignore = (*ignore, ROUTER)
    config = QuantConfig(method=method or "compressed-tensors", rules=(rule,), ignore=() if head else ignore)
    name = "lm_head" if head else UP
    with CheckpointWriter(directory) as writer:
        for part, tensor in write_linear(random_linear(scheme, 32, 64, 7), scheme, name).items():
            writer.add(f"{name}.{part}", tensor)
        writer.add(f"{name}.bias", StoredTensor(dtype="F16", array=np.arange(32, dtype=np.float16)))
        writer.add(f"{ROUTER}.weight", StoredTensor(dtype="F32", array=np.ones((4, 64), np.float32)))
        writer.add(f"{NORM}.weight", StoredTensor(dtype="BF16", array=np.arange(3, dtype=np.uint16)))
        text = json.dumps({"model_type": "llama", "quantization_config": write_quant_config(config)})
        writer.finish({"config.json": text.encode(), "tokenizer.json": b"{}"})
    return directory


def weights(directory: Path) -> dict[str, np.ndarray]:
    """Return every restored weight of a folder."""
    checkpoint = Checkpoint.open(directory)
    config = read_quant_config(read_json(directory / "config.json")["quantization_config"], "config.json")
    found = {}
    for module in quantised_modules(checkpoint.tensors):
        scheme = config.scheme_of(module)
        assert scheme is not None
        found[module] = read_linear(layer_tensors(checkpoint, module), scheme, module).dequantise()
    return found


def converted(source: Path, out: Path, layout: Layout) -> Path:
    convert(source, out, layout, lambda done, total: None)
    return out


def test_a_checkpoint_goes_through_every_format_and_comes_back_to_the_byte(tmp_path: Path) -> None:
    first = here = small(tmp_path / "first")
    before = weights(first)
    for layout in ("gptq", "gptq_v2", "pack-quantized"):
        here = converted(here, tmp_path / layout, layout)
        assert np.array_equal(weights(here)[UP], before[UP])
    ours, theirs = Checkpoint.open(first), Checkpoint.open(here)
    assert {n: bytes(ours.bytes(n)) for n in ours.tensors} == {
        n: bytes(theirs.bytes(n)) for n in theirs.tensors
    }
    assert (here / "tokenizer.json").read_bytes() == b"{}"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_converted_config_names_what_stays_dense(tmp_path: Path) -> None:
    source = small(tmp_path / "source")
    for layout in ("gptq", "awq"):
        out = converted(source, tmp_path / layout, layout)
        config = read_quant_config(read_json(out / "config.json")["quantization_config"], "config.json")
        assert config.scheme_of(ROUTER) is None and config.scheme_of("lm_head") is None
        assert config.scheme_of(UP) is not None
        assert np.array_equal(weights(out)[UP], weights(source)[UP])
    back = converted(tmp_path / "awq", tmp_path / "back", "pack-quantized")
    written = read_json(back / "config.json")["quantization_config"]
    assert written["ignore"] == ["lm_head", ROUTER]
    assert np.array_equal(weights(back)[UP], weights(source)[UP])


@pytest.mark.parametrize("folder", ["ct-w4a16-gptq", "ct-w4a16-awq-asym", "gptq-w4"])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "awq", "pack-quantized"])
def test_folders_of_other_tools_convert_exactly(folder: str, layout: Layout, tmp_path: Path) -> None:
    if not INTERCHANGE.is_dir():
        pytest.skip("shared/models/interchange is not beside this checkout")
    told: list[tuple[int, int]] = []
    convert(INTERCHANGE / folder, tmp_path / "out", layout, lambda *counts: told.append(counts))
    before, after = weights(INTERCHANGE / folder), weights(tmp_path / "out")
    assert before.keys() == after.keys() and len(after) == 14
    assert all(np.array_equal(before[module], after[module]) for module in before)
    assert told == sorted(told) and told[-1][0] == told[-1][1]
    if layout != "pack-quantized":
        assert {
            ref.dtype for n, ref in Checkpoint.open(tmp_path / "out").tensors.items() if "scales" in n
        } == {"F16"}


@pytest.mark.parametrize(
    ("scheme", "name", "values"),
    [
        (
            LinearScheme(layout="gptq", bits=4, strategy="group", group=32),
            "quantize_config.json",
            {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "true_sequential": True},
        ),
        (
            LinearScheme(layout="awq", bits=4, strategy="group", group=32, symmetric=False),
            "quant_config.json",
            {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"},
        ),
    ],
    ids=["AutoGPTQ", "AutoAWQ"],
)
def test_what_older_tools_left_beside_config_json_is_read(
    scheme: LinearScheme, name: str, values: dict[str, Any], tmp_path: Path
) -> None:
    source = small(tmp_path / "source", scheme)
    expected = weights(source)[UP]
    (source / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="is not quantised"):
        converted(source, tmp_path / "out", "pack-quantized")
    (source / name).write_text(json.dumps(values))
    out = converted(source, tmp_path / "out", "pack-quantized")
    assert np.array_equal(weights(out)[UP], expected)
    assert not (out / name).exists(), "it would contradict config.json"


def test_what_a_format_cannot_hold_leaves_nothing_behind(tmp_path: Path) -> None:
    source = small(tmp_path / "source", LinearScheme(layout="gptq", bits=8, strategy="group", group=32))
    with pytest.raises(ConfigError, match=f"{UP} cannot be stored as awq: AWQ has 4 bits, not 8"):
        converted(source, tmp_path / "out", "awq")
    ordered = LinearScheme(layout="gptq", bits=4, strategy="group", group=32, act_order=True)
    with pytest.raises(ConfigError, match="act-order"):
        converted(small(tmp_path / "ordered", ordered), tmp_path / "out", "awq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ordered", "source"]


def test_rounded_activations_are_not_lost_in_a_format_without_them(tmp_path: Path) -> None:
    token = ActivationScheme(kind="int", dynamic=True, strategy="token")
    scheme = LinearScheme(layout="int-quantized", bits=8, strategy="channel", activations=token)
    with pytest.raises(ConfigError, match="cannot be stored as gptq: it rounds its inputs to 8 bits"):
        converted(small(tmp_path / "source", scheme), tmp_path / "out", "gptq")


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [
        (SCHEME, "pack-quantized"),
        (LinearScheme(layout="gptq", bits=8, strategy="channel"), "pack-quantized"),
        (
            LinearScheme(
                layout="int-quantized",
                bits=8,
                strategy="channel",
                activations=ActivationScheme(kind="int", dynamic=True, strategy="token"),
            ),
            "int-quantized",
        ),
        (LinearScheme(layout="float-quantized", bits=8, strategy="tensor"), "float-quantized"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.layout,
)
def test_compressed_tensors_takes_the_layout_that_holds_the_layers(
    scheme: LinearScheme, layout: Layout, tmp_path: Path
) -> None:
    source = small(tmp_path / "source", scheme)
    assert layout_of("compressed-tensors", source) == layout
    assert layout_of("awq", source) == "awq"
    assert np.array_equal(weights(converted(source, tmp_path / "out", layout))[UP], weights(source)[UP])


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_a_restored_checkpoint_is_dense_and_holds_the_nearest_numbers(
    dtype: FloatType, tmp_path: Path
) -> None:
    source = small(tmp_path / "source")
    restore(source, tmp_path / "out", dtype, lambda done, total: None)
    found = Checkpoint.open(tmp_path / "out")
    assert set(found.tensors) == {f"{UP}.weight", f"{UP}.bias", f"{ROUTER}.weight", f"{NORM}.weight"}
    values = read_json(tmp_path / "out" / "config.json")
    assert "quantization_config" not in values
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    assert values["dtype"] == names[dtype]
    stored = StoredTensor.from_checkpoint(found, f"{UP}.weight")
    expected = weights(source)[UP]
    if dtype == "F32":
        assert np.array_equal(stored.floats(), expected)
    elif dtype == "F16":
        assert np.array_equal(stored.floats(), expected.astype(np.float16).astype(np.float32))
    else:  # no bfloat16 number is nearer, and of two the even one is taken
        bits = stored.array.astype(np.int64)
        distance = np.abs(stored.floats().astype(np.float64) - expected)
        for step in (-1, 1):
            beside = StoredTensor(dtype="BF16", array=(bits + step).astype(np.uint16)).floats()
            further = np.abs(beside.astype(np.float64) - expected)
            is_zero_or_edge = (bits & 0x7FFF == 0) | ((bits + step) & 0x7FFF == 0x7FFF)
            tie = further == distance
            assert (is_zero_or_edge | (further > distance) | (tie & (bits % 2 == 0))).all()


def test_a_weight_too_large_for_half_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layer has weights too large for F16"):
        StoredTensor.rounded(np.array([1e5], np.float32), "F16", "layer")


def test_sources_that_do_not_convert_are_refused(tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not quantised"):
        converted(tmp_path / "dense", tmp_path / "out", "awq")
    with pytest.raises(ConfigError, match="lm_head is quantised"):
        converted(small(tmp_path / "head", head=True), tmp_path / "out", "gptq")
    with pytest.raises(ConfigError, match="exists already"):
        converted(small(tmp_path / "source"), tmp_path / "head", "gptq")


@pytest.mark.parametrize("max_shard_bytes", [1, 700, 1 << 20])
def test_files_are_what_the_safetensors_library_reads(max_shard_bytes: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "a": StoredTensor(dtype="I8", array=random.integers(-9, 9, (3, 5)).astype(np.int8)),
        "b": StoredTensor(dtype="F32", array=random.normal(size=(7, 11)).astype(np.float32).T),
        "c": StoredTensor(dtype="BF16", array=random.integers(0, 9, (33,)).astype(np.uint16)),
        "d": StoredTensor(dtype="F32", array=np.zeros((0, 4), np.float32)),
        "e": StoredTensor(dtype="I64", array=np.array(5)),
    }
    with CheckpointWriter(tmp_path / "out", max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in arrays.items():
            writer.add(name, tensor)
        writer.finish({})
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == (5 if max_shard_bytes == 1 else 1)
    found = {name: entry for file in files for name, entry in deserialize(file.read_bytes())}
    assert found.keys() == arrays.keys()
    for name, tensor in arrays.items():
        assert bytes(found[name]["data"]) == tensor.array.tobytes()
        assert tuple(found[name]["shape"]) == tensor.array.shape and found[name]["dtype"] == tensor.dtype
    ours = Checkpoint.open(tmp_path / "out")
    assert all(StoredTensor.from_checkpoint(ours, name) == tensor for name, tensor in arrays.items())


def test_an_empty_checkpoint_and_a_name_written_twice(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "empty") as writer:
        writer.finish({})
    assert not Checkpoint.open(tmp_path / "empty").tensors
    with CheckpointWriter(tmp_path / "twice") as writer:
        writer.add("a", StoredTensor(dtype="I8", array=np.zeros(1, np.int8)))
        with pytest.raises(ConfigError, match="'a' would be written twice"):
            writer.add("a", StoredTensor(dtype="I8", array=np.zeros(1, np.int8)))
    assert not (tmp_path / "twice").exists()
