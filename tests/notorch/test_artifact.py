"""The engine directory: what is written, what reading refuses, and that it appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engine_fixtures import build, tensor_bytes, tensor_shapes, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_models import PLAN

from sailfish.artifact import Artifact, manifest
from sailfish.artifact.manifest import MANIFEST_FILE, Manifest, digest, encode
from sailfish.artifact.side import append_evidence, read_evidence, read_overlay, write_overlay
from sailfish.artifact.writer import EngineWriter
from sailfish.base.errors import ArtifactError, BuildError
from sailfish.kernels.contract import Choice
from sailfish.plan import DeviceOverlay


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture(scope="module")
def sound(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build(checkpoint, tmp_path_factory.mktemp("engines") / "sound")


@pytest.fixture
def engine(sound: Artifact, tmp_path: Path) -> Path:
    """A copy of a sound engine that a test may damage."""
    return Path(shutil.copytree(sound.directory, tmp_path / "engine"))


def rewrite(engine: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as an attacker would: canonical again, with a matching digest."""
    data = msgspec.json.decode((engine / MANIFEST_FILE).read_bytes())
    change(data)
    seal(engine, msgspec.json.encode(data, order="sorted") + b"\n")


def seal(engine: Path, data: bytes) -> None:
    (engine / MANIFEST_FILE).write_bytes(data)
    (engine / "manifest.sha256").write_text(f"{digest(data)}  {MANIFEST_FILE}\n")


def refusal(engine: Path) -> str:
    """Return the one line with which opening is refused."""
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(engine)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_engine_gives_back_every_tensor_of_its_checkpoint(sound: Artifact) -> None:
    shapes = tensor_shapes()
    found = {name: b"".join(p.read() for p in pieces) for name, _, pieces in sound.tensors()}
    assert found["embed.weight"] == tensor_bytes("model.embed_tokens.weight", 64 * 32 * 2)
    parts = [f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkv"]
    assert found["layers.1.qkv.weight"] == b"".join(
        tensor_bytes(name, 2 * shapes[name][0] * shapes[name][1]) for name in parts
    )
    assert sum(map(len, found.values())) == sum(2 * a * (b[0] if b else 1) for a, *b in shapes.values())


def test_a_bundle_holds_the_same_bytes_on_pages_of_its_own(
    sound: Artifact, checkpoint: Path, tmp_path: Path
) -> None:
    bundle = build(checkpoint, tmp_path / "bundle", bundle=True)
    for (name, shape, pieces), (own_name, own_shape, own_pieces) in zip(
        sound.tensors(), bundle.tensors(), strict=True
    ):
        assert (name, shape) == (own_name, own_shape)
        assert b"".join(p.read() for p in pieces) == b"".join(p.read() for p in own_pieces)
    assert all(tensor.pieces[0].offset % 4096 == 0 for tensor in bundle.manifest.tensors)
    assert not any(file.is_source for file in bundle.manifest.weights)


def test_a_bundle_needs_no_other_file(checkpoint: Path, tmp_path: Path) -> None:
    gone = Path(shutil.copytree(checkpoint, tmp_path / "gone"))
    build(gone, tmp_path / "bundle", bundle=True)
    shutil.rmtree(gone)
    moved = (tmp_path / "bundle").rename(tmp_path / "elsewhere")
    assert all(check.is_intact for check in Artifact.open(moved).verify())


def test_the_manifest_has_the_golden_bytes(sound: Artifact) -> None:
    """Format 5 is frozen: a change of these bytes needs a new format number."""
    weights = msgspec.structs.replace(sound.manifest.weights[0], path="../tiny/model.safetensors")
    choice = Choice(op="attention", implementation="x", why="best", declined=(("y", "too old"),))
    fixed = msgspec.structs.replace(
        sound.manifest, producer="sailfish", target="cpu", plan=PLAN, ops=(choice,), weights=(weights,)
    )
    assert encode(fixed) == Path(__file__).with_name("golden_manifest.json").read_bytes()


def test_the_digest_beside_the_manifest_is_what_sha256sum_checks(sound: Artifact) -> None:
    tool = shutil.which("sha256sum")
    if tool is None:
        pytest.skip("sha256sum is not installed")
    done = subprocess.run(
        [tool, "-c", "manifest.sha256"], cwd=sound.directory, capture_output=True, text=True
    )
    assert done.stdout == "manifest.json: OK\n"
    assert sound.digest == (sound.directory / "manifest.sha256").read_text().split()[0]


def test_the_same_build_twice_has_the_same_digest(checkpoint: Path, tmp_path: Path, sound: Artifact) -> None:
    assert build(checkpoint, tmp_path / "again").digest == sound.digest


def test_encoding_and_decoding_are_inverse(sound: Artifact) -> None:
    assert manifest.decode(encode(sound.manifest), "here") == sound.manifest


def test_a_directory_that_is_no_engine_is_told_apart_from_a_checkpoint(
    checkpoint: Path, tmp_path: Path
) -> None:
    assert "build one with" in refusal(tmp_path)
    assert "it is a checkpoint" in refusal(checkpoint)


def test_an_edited_manifest_is_refused(engine: Path) -> None:
    path = engine / MANIFEST_FILE
    path.write_bytes(path.read_bytes().replace(b'"head_dim":8', b'"head_dim":9'))
    assert "manifest.json is damaged" in refusal(engine)


@pytest.mark.parametrize(
    ("version", "words"),
    [(6, "upgrade Sailfish"), (4, "build the engine again"), (10**30, "upgrade Sailfish")],
)
def test_another_format_is_refused_with_the_way_out(engine: Path, version: int, words: str) -> None:
    data = json.loads((engine / MANIFEST_FILE).read_bytes())
    seal(engine, json.dumps(data | {"format": version}).encode())
    assert words in refusal(engine)


def test_a_newer_format_is_recognised_whatever_else_it_holds(engine: Path) -> None:
    seal(engine, b'{"format":7,"all":"different"}')
    assert "format 7; this Sailfish reads format 5" in refusal(engine)


def test_a_missing_file_is_named_with_the_ways_out(engine: Path) -> None:
    (engine / "tokenizer.json").unlink()
    words = refusal(engine)
    assert "tokenizer.json is gone" in words and "--bundle" in words


def test_a_changed_small_file_is_refused(engine: Path) -> None:
    (engine / "tokenizer.json").write_text('{"version": "1.1"}')
    assert "tokenizer.json is not what the engine was built from" in refusal(engine)


def test_a_small_file_that_became_a_link_is_refused(engine: Path, tmp_path: Path) -> None:
    (engine / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (engine / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    assert "is not a regular file" in refusal(engine)


def test_a_source_that_moved_shrank_or_has_another_header_is_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    build(source, tmp_path / "engine")
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert "the manifest says" in refusal(tmp_path / "engine")
    weights.write_bytes(whole.replace(b"model.norm", b"model.morn", 1))
    assert "the digest of its header differs" in refusal(tmp_path / "engine")
    weights.unlink()
    assert "model.safetensors is gone" in refusal(tmp_path / "engine")


def test_checkpoint_and_engine_side_by_side_can_move_together(checkpoint: Path, tmp_path: Path) -> None:
    pair = tmp_path / "pair"
    shutil.copytree(checkpoint, pair / "model")
    build(pair / "model", pair / "engine")
    pair.rename(tmp_path / "moved")
    assert Artifact.open(tmp_path / "moved" / "engine").weight_path
    assert all(check.is_intact for check in Artifact.open(tmp_path / "moved" / "engine").verify())


def test_verify_finds_one_flipped_bit_of_data(checkpoint: Path, tmp_path: Path) -> None:
    bundle = build(checkpoint, tmp_path / "bundle", bundle=True)
    path = tmp_path / "bundle" / "weights-00001.bin"
    data = bytearray(path.read_bytes())
    data[9000] ^= 1
    path.write_bytes(data)
    told: list[tuple[int, int]] = []
    checks = Artifact.open(bundle.directory).verify(lambda done, total: told.append((done, total)))
    assert [check.path.name for check in checks if not check.is_intact] == ["weights-00001.bin"]
    assert told[-1][0] == told[-1][1] == sum(check.n_bytes for check in checks)


def test_a_file_that_shrinks_while_it_is_read_is_told(checkpoint: Path, tmp_path: Path) -> None:
    bundle = build(checkpoint, tmp_path / "bundle", bundle=True)
    *_, last = bundle.tensors()
    os.truncate(last.pieces[-1].path, last.pieces[-1].offset + 3)
    with pytest.raises(ArtifactError, match="it ends at byte"):
        last.pieces[-1].read()
    last.pieces[-1].path.unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        last.pieces[-1].read()


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a path upwards": (lambda m: m["files"][0].update(name="../x"), "no name for a file"),
    "an absolute path": (lambda m: m["files"][0].update(name="/etc/passwd"), "no name for a file"),
    "its own manifest as a file": (
        lambda m: m["files"][0].update(name="manifest.json"),
        "no name for a file",
    ),
    "a source of another kind": (
        lambda m: m["weights"][0].update(path="/etc/passwd"),
        "not a safetensors file",
    ),
    "a piece past the end": (lambda m: m["tensors"][0]["pieces"][0].update(offset=1 << 40), "ends at byte"),
    "a piece in the header": (lambda m: m["tensors"][0]["pieces"][0].update(offset=0), "has a piece"),
    "a negative offset": (lambda m: m["tensors"][0]["pieces"][0].update(offset=-4096), "has a piece"),
    "a piece of no file": (lambda m: m["tensors"][0]["pieces"][0].update(file=9), "names weight file 9 of 1"),
    "half an element": (lambda m: m["tensors"][0]["pieces"][0].update(n_bytes=4095), "has a piece"),
    "an unknown dtype": (lambda m: m["tensors"][0]["pieces"][0].update(dtype="I64"), "dtype 'I64'"),
    "another shape": (lambda m: m["tensors"][0].update(shape=[32, 64]), "the model needs [64, 32]"),
    "a missing tensor": (lambda m: m["tensors"].pop(), "is missing"),
    "a foreign tensor": (
        lambda m: m["tensors"].append({"dtype": None, "name": "x", "pieces": [], "shape": [1]}),
        "the model has no tensor 'x'",
    ),
    "the same tensor twice": (lambda m: m["tensors"].append(m["tensors"][0]), "listed twice"),
    "too many layers": (lambda m: m["model"].update(layers=m["model"]["layers"] * 1000), "2000 layers"),
    "a huge width": (lambda m: m["model"].update(d_model=1 << 40), "d_model is"),
    "no heads": (lambda m: m["model"].update(n_kv_heads=0), "n_kv_heads is 0"),
    "a million experts": (
        lambda m: m["model"]["layers"][0].update(
            moe={"d_mlp": 1, "n_active": 1, "n_experts": 1 << 40, "normalise_topk": True}
        ),
        "experts",
    ),
    "a malformed digest": (lambda m: m["weights"][0].update(sha256="0"), "malformed digest"),
    "a negative size": (lambda m: m["weights"][0].update(n_bytes=-1), "bytes and a header"),
    "a number as text": (lambda m: m["model"].update(head_dim="8"), "damaged"),
    "an unknown key": (lambda m: m.update(run="rm"), "damaged"),
    "an unknown key inside": (lambda m: m["model"].update(run="rm"), "not in canonical form"),
    "a key too few": (lambda m: m.pop("target"), "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused_by_name(engine: Path, name: str) -> None:
    change, words = HOSTILE[name]
    rewrite(engine, change)
    assert words in refusal(engine)


def test_deep_nesting_and_huge_manifests_are_refused(engine: Path) -> None:
    seal(engine, b'{"format":4,"model":' + b"[" * 200_000)
    assert "damaged" in refusal(engine)
    with (engine / MANIFEST_FILE).open("wb") as stream:
        stream.truncate(manifest.MAX_MANIFEST_BYTES + 1)
    assert "at most" in refusal(engine)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_open_as_the_same_manifest_or_raise_artifact_error(
    sound: Artifact, data: st.DataObject
) -> None:
    whole = encode(sound.manifest)
    start = data.draw(st.integers(0, len(whole) - 1))
    end = data.draw(st.integers(start, min(start + 8, len(whole))))
    damaged = whole[:start] + data.draw(st.binary(max_size=8)) + whole[end:]
    try:
        found = manifest.decode(damaged, "here")
    except ArtifactError as error:
        assert "\n" not in str(error)
    else:
        assert encode(found) == damaged
        manifest.check(found, "here")


def test_an_existing_directory_is_never_replaced_unless_it_is_an_engine_and_force_is_given(
    checkpoint: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="exists and is no engine directory"):
        build(checkpoint, mine, force=True)
    assert (mine / "thesis.txt").read_text() == "years of work"
    build(checkpoint, tmp_path / "engine")
    with pytest.raises(ArtifactError, match="exists already"):
        build(checkpoint, tmp_path / "engine")
    build(checkpoint, tmp_path / "engine", bundle=True, force=True)
    assert Artifact.open(tmp_path / "engine").manifest.weights[0].path == "weights-00001.bin"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "mine"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failing_disk_leaves_nothing_behind(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(BuildError, match="No space left on device") as caught:
        build(checkpoint, tmp_path / "engine", bundle=True)
    assert "free some space" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_replacement_that_fails_leaves_the_old_engine_in_place(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build(checkpoint, tmp_path / "engine")
    rename = Path.rename

    def fail_on_staging(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_staging)
    with pytest.raises(BuildError, match="Input/output error"):
        build(checkpoint, tmp_path / "engine", bundle=True, force=True)
    assert Artifact.open(tmp_path / "engine").digest == old.digest
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_a_disk_too_small_is_told_before_anything_is_copied(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 999, 1))  # type: ignore[attr-defined]
    with pytest.raises(BuildError, match="its disk has 1 B free"):
        build(checkpoint, tmp_path / "engine", bundle=True)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_told_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="writing the engine .* failed: (Not a directory|File exists)"):
        build(checkpoint, tmp_path / "file" / "engine")


def test_a_second_builder_of_the_same_engine_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    with (
        EngineWriter(tmp_path / "engine"),
        pytest.raises(ArtifactError, match="another build is writing"),
        EngineWriter(tmp_path / "engine"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_builder_left_is_cleared(checkpoint: Path, tmp_path: Path) -> None:
    left = tmp_path / ".engine.partial"
    left.mkdir()
    (left / ".lock").write_text("")
    (left / "weights-00001.bin").write_bytes(b"half of it")
    build(checkpoint, tmp_path / "engine")
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_a_lock_file_that_another_build_renamed_away_is_not_mistaken_for_the_lock(tmp_path: Path) -> None:
    left = tmp_path / ".engine.partial"
    left.mkdir()
    with (left / ".lock").open("w") as stale:
        fcntl.flock(stale, fcntl.LOCK_EX)
        (left / ".lock").unlink()
        with EngineWriter(tmp_path / "engine") as writer:
            writer.add_file("x", b"1")
    assert list(tmp_path.iterdir()) == []


def test_an_overlay_is_read_back_for_its_own_engine_only(engine: Path, tmp_path: Path) -> None:
    artifact = Artifact.open(engine)
    overlay = DeviceOverlay(
        device_key="sm_90-nvidia-h200",
        software="torch 2",
        runtime_bytes=123456789,
        launches={1: {"norm": 65, "gemm": 129}, 16: {"norm": 65}},
    )
    assert read_overlay(artifact, overlay.device_key, "torch 2") is None
    path = write_overlay(artifact, overlay)
    assert path.name == "overlay-sm_90-nvidia-h200.json"
    assert read_overlay(artifact, overlay.device_key, "torch 2") == overlay
    assert read_overlay(artifact, overlay.device_key, "torch 3") is None
    other = Artifact(engine, artifact.manifest, "0" * 64)
    assert read_overlay(other, overlay.device_key, "torch 2") is None
    assert Artifact.open(engine).digest == artifact.digest
    path.write_bytes(path.read_bytes()[:-20])
    assert read_overlay(artifact, overlay.device_key, "torch 2") is None  # and not a start refused
    write_overlay(artifact, replace(overlay, runtime_bytes=99 * 10**9))
    assert read_overlay(artifact, overlay.device_key, "torch 2") is None
    with pytest.raises(ArtifactError, match="cannot name a file"):
        read_overlay(artifact, "../../x", "torch 2")


def test_evidence_grows_line_by_line_and_names_its_engine(engine: Path) -> None:
    artifact = Artifact.open(engine)
    begin = datetime.now(UTC).replace(microsecond=0)
    append_evidence(artifact, "perplexity", {"ppl": 39.3}, device="cpu")
    append_evidence(artifact, "speed", {"tokens_per_s": 12.0, "prompt": "books"}, device="sm_90")
    first, second = read_evidence(artifact)
    assert (first.kind, first.device, first.values) == ("perplexity", "cpu", {"ppl": 39.3})
    assert second.values == {"tokens_per_s": 12.0, "prompt": "books"}
    assert first.manifest == second.manifest == artifact.digest
    assert begin <= datetime.fromisoformat(first.at) <= datetime.fromisoformat(second.at)
    assert read_evidence(Artifact(engine, artifact.manifest, "0" * 64)) == []
    with (engine / "evidence.jsonl").open("a") as stream:
        stream.write("{}\n")
    with pytest.raises(ArtifactError, match="line 3 is damaged"):
        read_evidence(artifact)


def test_a_manifest_is_written_only_if_it_would_be_read(sound: Artifact, tmp_path: Path) -> None:
    broken: Manifest = msgspec.structs.replace(sound.manifest, tensors=sound.manifest.tensors[1:])
    with (
        EngineWriter(tmp_path / "engine") as writer,
        pytest.raises(ArtifactError, match="embed.weight is missing"),
    ):
        writer.commit(broken)
    assert list(tmp_path.iterdir()) == []
