"""Checkpoints that come quantised: engines keep their bits, or restore them and say why; the same numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from paged import PagedDriver, load_engine_weights
from rounded import restored
from safetensors.torch import load_file, save_file
from stored_twins import FP8, FP8_STATIC, INT8, INT8_STATIC, Schemes, store_twin, stored_numbers, stored_truth
from torch import Tensor
from twins import make_twin

from sailfish.artifact.reader import Artifact
from sailfish.artifact.side import read_evidence
from sailfish.base.config import EngineConfig
from sailfish.base.errors import CheckpointError, ConfigError, PlanError, UnsupportedModelError
from sailfish.build.builder import build_engine
from sailfish.checkpoint.formats.explain import format_warnings
from sailfish.checkpoint.formats.kept import row_order
from sailfish.checkpoint.formats.scheme import LinearScheme
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.checkpoint.names import check_tensors, linear_modules
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.models.layers.linear import LinearWeight, OrderedInt4
from sailfish.plan.formats import engine_specs
from sailfish.plan.ops import gathered_bytes

MODELS = Path(__file__).parents[2].parent / "shared" / "models"
pytestmark = pytest.mark.usefixtures("quantises_in_this_process", "has_no_library")
FLOAT32 = EngineConfig(dtype="float32")
G32 = LinearScheme(layout="pack-quantized", bits=4, strategy="group", group=32)
G64 = replace(G32, group=64)
ASYMMETRIC = replace(G32, symmetric=False)
CHANNEL = replace(G32, strategy="channel", group=None)
GPTQ = replace(G32, layout="gptq")
QUANTISED: dict[str, tuple[str, Schemes, str]] = {
    "groups of 32": ("llama", {"": G32}, "int4"),
    "groups of 64 and 32": ("qwen2", {"mlp": G64, "": G32}, "int4"),
    "zero points in some layers": ("llama_tied", {"layers.1": ASYMMETRIC, "": G32}, "int4"),
    "a scale for each row": ("llama", {"": CHANNEL}, "int4"),
    "3 and 2 bits": ("llama", {"mlp": replace(G32, bits=3), "": replace(ASYMMETRIC, bits=2)}, "int4"),
    "gptq": ("llama", {"": GPTQ}, "int4"),
    "gptq_v2 with zero points": (
        "llama_tied",
        {"": replace(GPTQ, layout="gptq_v2", symmetric=False)},
        "int4",
    ),
    "awq": ("llama", {"mlp.down": None, "": replace(ASYMMETRIC, layout="awq")}, "int4"),
    "a dense layer, and one dense linear of a product": (
        "llama",
        {"layers.0.mlp": None, "layers.2.self_attn.k_proj": None, "": G32},
        "int4",
    ),
    "act-order in one layer": (
        "llama",
        {"layers.1.mlp.down": replace(G32, act_order=True), "": G32},
        "int4",
    ),
    "act-order": ("llama_tied", {"": replace(GPTQ, act_order=True)}, "int4"),
    "act-order with zero points and wide groups": (
        "qwen2",
        {"": replace(GPTQ, group=64, symmetric=False, act_order=True)},
        "int4",
    ),
    "act-order in several orders": ("llama", {"": replace(GPTQ, act_order=True)}, "int4"),
    "int8": ("llama", {"": INT8}, "int8"),
    "int8 with a scale for each matrix": ("llama_tied", {"": replace(INT8, strategy="tensor")}, "int8"),
    "int8 with static scales": ("llama", {"": INT8_STATIC}, "int8"),
    "fp8": ("qwen2", {"": FP8}, "fp8"),
    "fp8 with static scales in a layer": ("qwen2", {"layers.1": FP8_STATIC, "": FP8}, "fp8"),
    "8 bits, activations as they are": ("llama", {"": replace(INT8, activations=None)}, "plain"),
    "8 bits in groups": ("llama", {"": replace(G32, bits=8)}, "plain"),
    "int8 beside int4, and fp8 in a layer": (
        "llama",
        {"layers.1.self_attn.o": FP8, "mlp.down": INT8, "": G32},
        "int4",
    ),
    "the head": ("llama", {"lm_head": G64, "": G32}, "int4"),
    "experts": ("mixtral", {"block_sparse_moe.gate|mlp.gate$": None, "": G32}, "int4"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("stored")


def folder(name: str, home: Path) -> Path:
    twin, schemes, _ = QUANTISED[name]
    path = home / name.replace(" ", "-")
    if path.exists():
        return path
    return store_twin(make_twin(twin, home / "twins"), path, schemes, own_orders="several" in name)


def engine_of(source: Path, home: Path) -> Artifact:
    out = home / "engines" / source.name
    if not out.exists():
        build_engine(source, out, config=FLOAT32, target="cpu")
    return Artifact.open(out)


def numbers_of(weight: LinearWeight) -> Tensor:
    """Return the numbers that a weight stands for, its inputs as the model has them."""
    if isinstance(weight, OrderedInt4):
        return restored(weight.weight)[:, weight.order_I.argsort()]
    return restored(weight)


def interchange(name: str, home: Path) -> Path:
    """Return a folder that another tool wrote, with books-4m's tokenizer beside it."""
    source = MODELS / "interchange" / name
    if not source.is_dir():
        pytest.skip("shared/models/interchange is not beside this checkout")
    path = home / "interchange" / name
    if not path.exists():
        path.mkdir(parents=True)
        for file in (*source.iterdir(), MODELS / "books-4m" / "tokenizer.json"):
            (path / file.name).symlink_to(file)
    return path


def check_logits(source: Path, engine: Artifact, *, vocab_size: int) -> None:
    """Compare a prompt's logits with transformers' of the same numbers, computed in float32."""
    prompt = torch.randint(0, vocab_size, (150,), generator=torch.Generator().manual_seed(3)).tolist()
    formats = engine.manifest.plan.formats
    is_8_bit = not {"int8", "fp8"}.isdisjoint((formats.layers, *(other for _, other in formats.others)))
    with torch.inference_mode():
        truth = stored_truth(source, rounds_activations=is_8_bit)
        expected = truth(torch.tensor([prompt])).logits[0]
    found = PagedDriver(source, seed=1, engine=engine).prefill({0: prompt}, largest_chunk=40)[0]
    wrong_Q = (found - expected).norm(dim=1) / expected.norm(dim=1)
    # One 8-bit activation next to a tie may round the other way, which then reaches all later positions.
    assert wrong_Q.quantile(0.05 if is_8_bit else 0.5) < 1e-5
    assert wrong_Q.max() < (0.15 if is_8_bit else 1e-5)


# transformers joins experts under other names: their numbers alone are compared, below.
@pytest.mark.parametrize("name", [name for name in QUANTISED if name != "experts"])
def test_an_engine_gives_the_logits_of_transformers_with_the_stored_numbers(name: str, home: Path) -> None:
    source = folder(name, home)
    check_logits(source, engine_of(source, home), vocab_size=256)


@pytest.mark.parametrize("name", QUANTISED)
def test_every_stored_number_is_the_engines_own(name: str, home: Path) -> None:
    source = folder(name, home)
    engine = engine_of(source, home)
    formats, model = engine.manifest.plan.formats, engine.manifest.model
    assert formats.layers == QUANTISED[name][2]
    weights, numbers = load_engine_weights(engine), stored_numbers(source)
    n_compared = 0
    for spec, _ in engine_specs(model, formats):
        modules = linear_modules(spec)
        if modules and all(module in numbers for module in modules):
            expected = torch.cat([numbers[module][1] for module in modules]).view(spec.shape)
            order = row_order(spec)
            expected = expected if order is None else expected[torch.from_numpy(order)]
            assert torch.equal(numbers_of(weights[spec.name]), expected), spec.name
            n_compared += len(modules)
    is_partly_dense = "dense linear" in name
    assert n_compared == len(numbers) - (2 if is_partly_dense else 0)


@pytest.mark.parametrize(
    "name",
    (
        "ct-w4a16-gptq",
        "ct-w4a16-awq-asym",
        "ct-w8a8-smoothquant",
        "ct-fp8-dynamic",
        "gptq-w4",
        "gptq-w4-actorder",
    ),
)
def test_what_other_tools_wrote_gives_their_numbers_logits(name: str, home: Path) -> None:
    source = interchange(name, home)
    check_logits(source, engine_of(source, home), vocab_size=8000)


def test_a_plan_says_what_the_checkpoint_stores_and_what_is_restored(home: Path) -> None:
    kept = engine_of(folder("groups of 32", home), home).manifest
    weights = next(decision for decision in kept.plan.decisions if decision.name == "weights")
    assert weights.active == "int4 (groups of 32)" and "4 bits in groups of 32" in weights.why
    assert kept.quantised_by == "the checkpoint: compressed-tensors, 4 bits in groups of 32"
    static = engine_of(folder("int8 with static scales", home), home).manifest.plan
    weights = next(decision for decision in static.decisions if decision.name == "weights")
    assert weights.why.endswith("8 bits by channel, static int8 activations")
    partly = engine_of(folder("act-order in several orders", home), home)
    decisions = {decision.name: decision for decision in partly.manifest.plan.decisions}
    found = decisions["restored_weights"]
    assert found.is_downgrade and found.active.startswith("6 of the layers'")
    assert "share a product have their inputs in several orders" in found.why
    assert decisions["act_order"].active == "6 of the layers' weights"
    assert not read_evidence(partly), "nothing was rounded, so there is no error"
    config = replace(FLOAT32, strict=True)
    with pytest.raises(PlanError, match="no kernel multiplies 8-bit weights with activations that stay"):
        build_engine(folder("8 bits in groups", home), home / "strict", config=config, target="cpu")


def test_a_product_whose_linears_scale_their_inputs_apart_is_restored(home: Path, tmp_path: Path) -> None:
    twin = make_twin("llama_tied", home / "twins")
    source = store_twin(twin, tmp_path / "several", {"": INT8_STATIC}, own_orders=True)
    config = load_model_config(source)
    assert config.stored is not None and config.stored.restored is not None
    n_layers = len(config.layers)
    assert set(config.stored.static) == {
        f"layers.{i}.{part}.weight" for i in range(n_layers) for part in ("o", "down")
    }
    assert "several static scales of their inputs" in config.stored.restored


def test_scales_of_a_kv_cache_beside_dense_weights_are_read_past_with_a_warning(
    home: Path, tmp_path: Path
) -> None:
    source = make_twin("llama", home / "twins")
    tensors = {f"model.layers.{i}.self_attn.{x}_scale": torch.tensor([0.03]) for i in range(3) for x in "kv"}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").symlink_to(source / "tokenizer.json")
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    values["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "kv_cache_scheme": cache,
    }
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    config, checkpoint = load_model_config(tmp_path), Checkpoint.open(tmp_path)
    check_tensors(config, checkpoint)
    assert config.stored is not None and config.stored.format == "plain" and config.stored.restored is None
    assert "--kv-dtype makes a cache with its own" in "; ".join(format_warnings(checkpoint, config.stored))
    engine = build_engine(tmp_path, tmp_path / "engine", config=FLOAT32, target="cpu", bundle=True)
    dense = engine_of(source, home)
    found, expected = load_engine_weights(engine), load_engine_weights(dense)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_step_has_room_for_inputs_that_are_gathered(home: Path) -> None:
    manifest = engine_of(folder("act-order in one layer", home), home).manifest
    formats = manifest.plan.formats
    assert formats.ordered == ("layers.1.down.weight",)
    assert gathered_bytes(manifest.model, formats, "float32", 64) == 64 * 112 * 4
    assert gathered_bytes(manifest.model, replace(formats, ordered=()), "bfloat16", 64) == 0
    everywhere = replace(formats, ordered=("layers.0.o.weight", "layers.2.qkv.weight"))
    assert gathered_bytes(manifest.model, everywhere, "bfloat16", 64) == 64 * 96 * 2


def test_a_plain_dtype_restores_all_and_another_format_is_refused(home: Path) -> None:
    source = folder("groups of 32", home)
    config = replace(FLOAT32, weights="float32")
    engine = build_engine(source, home / "restored", config=config, target="cpu")
    assert engine.manifest.plan.formats.layers == "plain" and engine.manifest.quantised_by is None
    check_logits(source, engine, vocab_size=256)
    with pytest.raises(ConfigError, match="weights 'int8' is not what the checkpoint stores: compressed"):
        build_engine(source, home / "never", config=replace(FLOAT32, weights="int8"), target="cpu")
    with pytest.raises(ConfigError, match="weight_group 64 is not what the checkpoint stores"):
        build_engine(source, home / "never", config=replace(FLOAT32, weight_group=64), target="cpu")


def test_a_quantised_head_joins_stored_weights(home: Path) -> None:
    source = folder("zero points in some layers", home)
    engine = build_engine(source, home / "head", config=replace(FLOAT32, head="int4"), target="cpu")
    assert engine.manifest.quantised_by is not None
    assert engine.manifest.quantised_by.startswith("the checkpoint: ")
    assert "round to nearest" in engine.manifest.quantised_by
    assert set(read_evidence(engine)[0].values) == {"head"}


def test_act_order_that_the_config_hides_is_found_in_the_tensors(home: Path, tmp_path: Path) -> None:
    hidden = edited(folder("act-order", home), tmp_path / "order", desc_act=False)
    engine = build_engine(hidden, tmp_path / "out", config=FLOAT32, target="cpu")
    assert len(engine.manifest.plan.formats.ordered) == 12
    check_logits(folder("act-order", home), engine, vocab_size=256)


def edited(source: Path, out: Path, **changes: Any) -> Path:
    """Copy a folder with other keys in its quantization_config."""
    out.mkdir()
    for file in source.iterdir():
        (out / file.name).symlink_to(file)
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    values["quantization_config"] |= changes
    (out / "config.json").unlink()
    (out / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return out


def test_a_config_that_hides_what_is_stored_is_refused_in_words(home: Path, tmp_path: Path) -> None:
    hidden = edited(folder("gptq_v2 with zero points", home), tmp_path / "zeros", sym=True)
    with pytest.raises(UnsupportedModelError, match="has zero points, though quantization_config"):
        build_engine(hidden, tmp_path / "out", config=FLOAT32, target="cpu")
    dense = edited(folder("groups of 32", home), tmp_path / "dense", ignore=["re:.*mlp.*", "lm_head"])
    with pytest.raises(CheckpointError, match="but quantization_config leaves it dense"):
        load_model_config(dense)
