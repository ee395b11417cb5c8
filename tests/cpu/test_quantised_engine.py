"""Engines with weights in 4 and 8 bits: what they hold, what they compute, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from local_engine import LocalEngine, greedy
from paged import PagedDriver, load_engine_weights
from rounded import restored, rounded_truth, source_rows
from safetensors.torch import load_file, save_file
from torch import Tensor
from twins import make_twin

from sailfish.artifact.contents import kinds
from sailfish.artifact.manifest import MANIFEST_FILE, digest
from sailfish.artifact.reader import Artifact
from sailfish.artifact.side import read_evidence
from sailfish.base.config import EngineConfig
from sailfish.base.errors import ArtifactError, BuildError, ConfigError, PlanError
from sailfish.build import builder
from sailfish.build.builder import build_engine
from sailfish.build.quantise import Quantiser
from sailfish.cli.inspect import show_weights
from sailfish.compress.rtn import quantise_8, quantise_int4, restore_8, restore_int4
from sailfish.data import demo_model
from sailfish.kernels.contract import Weight8
from sailfish.kernels.int4 import Int4Weight
from sailfish.models.layers.linear import LinearWeight
from sailfish.plan.formats import engine_specs

pytestmark = pytest.mark.usefixtures("quantises_in_this_process", "has_no_library")
FLOAT32 = EngineConfig(dtype="float32")
ENGINES: dict[str, tuple[str, EngineConfig]] = {
    "int4": ("llama", replace(FLOAT32, weights="int4", weight_group=32)),
    "int4 of a tied model, whose head is int8": ("llama_tied", replace(FLOAT32, weights="int4", head="int8")),
    "int8 everywhere": ("llama_tied", replace(FLOAT32, weights="int8", embedding="int8")),
    "int8 with norms after and soft-caps": ("gemma2", replace(FLOAT32, weights="int8", embedding="int8")),
    "fp8 with an int4 head": ("qwen2", replace(FLOAT32, weights="fp8", head="int4", weight_group=64)),
    "int4 attention beside plain experts": ("mixtral", replace(FLOAT32, weights="int4")),
    "nothing but an int8 embedding": ("llama", replace(FLOAT32, embedding="int8")),
    "a plain head of a model tied to an int8 embedding": (
        "llama_tied",
        replace(FLOAT32, embedding="int8", head="plain"),
    ),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("quantised")


def _twin(name: str, home: Path) -> Path:
    return make_twin(ENGINES[name][0], home / "twins")


def _engine(name: str, home: Path) -> Artifact:
    directory = home / name
    if not directory.exists():
        build_engine(_twin(name, home), directory, config=ENGINES[name][1], target="cpu")
    return Artifact.open(directory)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_gives_the_logits_of_transformers_with_the_same_rounded_weights(
    name: str, home: Path
) -> None:
    prompt = torch.randint(0, 256, (150,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.inference_mode():
        expected = rounded_truth(_twin(name, home), _engine(name, home))(torch.tensor([prompt])).logits[0]
    driver = PagedDriver(_twin(name, home), seed=1, engine=_engine(name, home))
    found = driver.prefill({0: prompt}, largest_chunk=40)[0]
    wrong_Q = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert wrong_Q.median() < 1e-5
    # One 8-bit activation next to a tie may round the other way, which then reaches all later positions.
    formats = _engine(name, home).manifest.plan.formats
    has_ties = {"int8", "fp8"} & {formats.layers, formats.head}
    assert wrong_Q.max() < (0.15 if has_ties else 1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_every_weight_is_the_nearest_that_its_format_has(name: str, home: Path) -> None:
    engine = _engine(name, home)
    checkpoint: dict[str, Tensor] = {}
    for file in _twin(name, home).glob("*.safetensors"):
        checkpoint |= load_file(file)
    formats, weights = engine.manifest.plan.formats, load_engine_weights(engine)
    n_quantised = 0
    for spec, format in engine_specs(engine.manifest.model, formats):
        stored = torch.cat([checkpoint[source].flatten() for source in spec.sources]).view(spec.shape)
        stored = stored[source_rows(spec)]
        weight = weights[spec.name]
        if format == "plain":
            assert torch.equal(restored(weight), stored)
            continue
        n_quantised += 1
        if format == "int4":
            expected = restore_int4(*quantise_int4(stored, formats.group), formats.group)
        else:
            expected = restore_8(*quantise_8(stored, format))
        assert torch.equal(restored(weight), expected)
    assert n_quantised > 0
    arena = sum(-(-tensor.n_bytes // 256) * 256 for tensor in _arena(weights))
    assert arena == engine.manifest.plan.memory_bytes("weights")


class _Part:
    def __init__(self, tensor: Tensor) -> None:
        self.n_bytes = tensor.numel() * tensor.element_size()


def _arena(weights: dict[str, LinearWeight]) -> Iterator[_Part]:
    for weight in weights.values():
        match weight:
            case Int4Weight():
                yield from (_Part(weight.packed), _Part(weight.scale))
            case Weight8():
                yield from (_Part(weight.values_OI), _Part(weight.scale_O))
            case Tensor():
                yield _Part(weight)


def test_the_build_records_how_far_each_kind_of_weight_is_from_the_checkpoint(home: Path) -> None:
    engine = _engine("int4 of a tied model, whose head is int8", home)
    assert engine.manifest.quantised_by == (
        "round to nearest: symmetric int4 with scales of least squared error for 128 inputs, "
        "int8 with a scale for each row"
    )
    [evidence] = read_evidence(engine)
    assert evidence.kind == "weight_error" and evidence.device == "cpu"
    assert evidence.values.keys() == {"qkv", "o", "gate_up", "down", "head"}
    assert all(0.06 < float(evidence.values[kind]) < 0.13 for kind in ("qkv", "o", "gate_up", "down"))
    assert float(evidence.values["head"]) < 0.012


def test_a_quantised_engine_needs_no_checkpoint_any_more(home: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(_twin("int4", home), tmp_path / "checkpoint"))
    build_engine(checkpoint, tmp_path / "engine", config=ENGINES["int4"][1], target="cpu")
    shutil.rmtree(checkpoint)
    moved = Artifact.open((tmp_path / "engine").rename(tmp_path / "moved"))
    assert all(check.is_intact for check in moved.verify())
    assert all(tensor.pieces[0].offset % 4096 == 0 for tensor in moved.manifest.tensors)


def test_the_same_build_twice_has_the_same_digests_and_in_a_process_of_its_own_too(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "Quantiser", Quantiser)
    told: list[tuple[str, int, int]] = []
    again = build_engine(
        _twin("int4", home),
        tmp_path / "again",
        config=ENGINES["int4"][1],
        target="cpu",
        progress=lambda *word: told.append(word),
    )
    first = _engine("int4", home).manifest
    assert (again.manifest.tensors, again.manifest.weights) == (first.tensors, first.weights)
    quantised = [(done, total) for stage, done, total in told if stage == "quantise"]
    assert quantised == sorted(quantised) and quantised[-1][0] == quantised[-1][1]


def test_weights_that_are_not_finite_are_refused_by_name_and_nothing_is_left(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "Quantiser", Quantiser)
    checkpoint = Path(shutil.copytree(_twin("int4", home), tmp_path / "checkpoint"))
    wrong = "model.layers.1.mlp.down_proj.weight"
    for file in checkpoint.glob("*.safetensors"):
        tensors = load_file(file)
        if wrong in tensors:
            tensors[wrong][3, 5] = float("nan")
            save_file(tensors, file)
    with pytest.raises(BuildError, match=r"layers\.1\.down\.weight cannot be quantised: .* not finite"):
        build_engine(checkpoint, tmp_path / "engine", config=ENGINES["int4"][1], target="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_an_engine_for_another_target_holds_the_same_weights(home: Path, tmp_path: Path) -> None:
    config = replace(ENGINES["int4"][1], dtype=None)
    other = build_engine(_twin("int4", home), tmp_path / "sm_90", config=config, target="sm_90")
    here = _engine("int4", home)
    assert (other.manifest.target, other.manifest.plan.dtype) == ("sm_90", "bfloat16")
    for one, another in zip(here.tensors(), other.tensors(), strict=True):
        is_same = [piece.read() for piece in one.pieces] == [piece.read() for piece in another.pieces]
        assert is_same != one.name.endswith(".packed"), "a GPU and a CPU read codes in other orders"
    others = load_engine_weights(other)
    for name, weight in load_engine_weights(here).items():
        if isinstance(weight, Int4Weight):
            assert torch.equal(restored(weight), restored(others[name]))


def test_experts_keep_their_dtype_and_the_plan_says_why(home: Path) -> None:
    plan = _engine("int4 attention beside plain experts", home).manifest.plan
    [decision] = [decision for decision in plan.decisions if decision.name == "experts"]
    assert (decision.requested, decision.active) == ("int4", "float32")
    assert "no kernel reads int4 experts" in decision.why


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (EngineConfig(weights="int8"), "holds int4 .groups of 32. weights, asked for were int8"),
        (EngineConfig(weight_group=64), "asked for were int4 .groups of 64."),
        (EngineConfig(head="int8"), "int8 head"),
        (EngineConfig(weights="float32"), "asked for were plain"),
    ],
)
def test_a_start_that_asks_for_other_formats_is_refused(home: Path, asked: EngineConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        LocalEngine(_engine("int4", home).directory, asked)
    assert "build the engine again" in str(caught.value.hint)


def test_a_start_is_planned_to_the_byte_and_names_its_fallback(home: Path) -> None:
    engine = LocalEngine(_engine("int4", home).directory, EngineConfig(weights="int4"))
    reading = next(memory for memory in engine.booted.memory if memory.name == "weights")
    assert reading.measured_bytes is not None
    assert abs(reading.measured_bytes - reading.planned_bytes) < 2 << 20
    assert [word for word in engine.booted.downgrades if word.startswith("linear_int4 is widened_rows")]
    with pytest.raises(PlanError, match="linear_int4 is widened_rows"):
        LocalEngine(_engine("int4", home).directory, EngineConfig(strict=True))
    engine.submit(0, list(range(40)), greedy(320), 12)
    assert len(engine.run()[0].token_ids) == 12


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another group": (lambda m: m["plan"]["formats"].update(group=64), "the model needs"),
    "a group of nothing": (lambda m: m["plan"]["formats"].update(group=0), "0 inputs share a scale"),
    "another format": (lambda m: m["plan"]["formats"].update(layers="int8"), "is missing"),
    "an unknown format": (lambda m: m["plan"]["formats"].update(layers="int3"), "damaged"),
    "a 4-bit embedding": (lambda m: m["plan"]["formats"].update(embedding="int4"), "embedding is in int4"),
    "codes of another dtype": (lambda m: _packed(m).update(dtype="F32"), "is in 'F32', its format has 'I32'"),
    "codes in the plan's dtype": (lambda m: _packed(m).update(dtype=None), "its format has 'I32'"),
    "codes of another shape": (lambda m: _packed(m).update(shape=[1, 2, 32, 4]), "the model needs"),
    "pieces of another dtype": (
        lambda m: _packed(m)["pieces"][0].update(dtype="F32"),
        "piece of dtype 'F32'",
    ),
    "codes past the end": (lambda m: _packed(m)["pieces"][0].update(offset=1 << 40), "ends at byte"),
    "too few codes": (lambda m: _packed(m)["pieces"][0].update(n_bytes=512), "elements, its shape needs"),
    "scales that are codes": (lambda m: m["tensors"].remove(_packed(m)), "is missing"),
    "nobody who did it": (lambda m: m.update(quantised_by=None), "who quantised"),
}


def _packed(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(t for t in manifest["tensors"] if t["name"] == "layers.0.qkv.weight.packed")
    return found


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_manifest_is_refused_in_one_line(attack: str, home: Path, tmp_path: Path) -> None:
    engine = Path(shutil.copytree(_engine("int4", home).directory, tmp_path / "engine"))
    change, words = HOSTILE[attack]
    manifest = msgspec.json.decode((engine / MANIFEST_FILE).read_bytes())
    change(manifest)
    data = msgspec.json.encode(manifest, order="sorted") + b"\n"
    (engine / MANIFEST_FILE).write_bytes(data)
    (engine / "manifest.sha256").write_text(f"{digest(data)}  {MANIFEST_FILE}\n")
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(engine)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_packaged_model_still_writes_sentences_in_four_bits(tmp_path: Path) -> None:
    config = EngineConfig(weights="int4", head="int8", embedding="int8")
    build_engine(demo_model(), tmp_path / "engine", config=config, target="cpu")
    engine = LocalEngine(tmp_path / "engine", EngineConfig())
    assert json.loads((tmp_path / "engine" / MANIFEST_FILE).read_bytes())["requested"]["weights"] == "int4"
    plain = LocalEngine.build(demo_model(), tmp_path / "plain", EngineConfig())
    sizes = [next(m.planned_bytes for m in e.booted.memory if m.name == "weights") for e in (engine, plain)]
    assert sizes[0] < 0.22 * sizes[1]


def test_the_contents_of_an_engine_are_told_kind_by_kind(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = _engine("int4 of a tied model, whose head is int8", home)
    found = {kind.name: kind for kind in kinds(engine)}
    assert set(found) == {"embed", "norms", "qkv", "o", "gate_up", "down", "biases", "head"}
    assert (found["qkv"].format, found["qkv"].n_tensors, found["qkv"].n_weights) == ("int4", 3, 3 * 160 * 96)
    assert found["qkv"].bits == pytest.approx(8 * (192 * 128 / 2 + 192 * 2) / (160 * 96), rel=1e-6)
    assert (found["head"].format, found["embed"].format, found["embed"].bits) == ("int8", "float32", 32)
    assert found["embed"].error is None and found["qkv"].error == pytest.approx(0.097, abs=0.03)
    show_weights(engine)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["head", "1", "int8", "8.333"] in [row[:4] for row in rows]
