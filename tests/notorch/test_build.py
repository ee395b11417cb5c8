"""Building and finding engines: what is recorded, what is refused, and when a cached engine serves again."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from engine_fixtures import CONFIG, ENVIRON, TOKENIZER, build, write_checkpoint, write_safetensors

from sailfish.artifact import Artifact
from sailfish.base.config import EngineConfig
from sailfish.base.errors import BuildError, CheckpointError, ConfigError
from sailfish.build import cache
from sailfish.build.builder import build_engine, model_name
from sailfish.build.cache import cache_root, find_or_build, locate_engine
from sailfish.data import demo_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "models" / "tiny")


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {**ENVIRON, "XDG_CACHE_HOME": str(tmp_path / "cache")}


def test_an_engine_records_model_target_plan_ops_and_copied_files(checkpoint: Path, tmp_path: Path) -> None:
    engine = build(checkpoint, tmp_path / "engine").manifest
    assert (engine.name, engine.target, engine.model.family) == ("tiny", "sm_90", "llama")
    assert (engine.model.d_model, engine.model.n_layers) == (
        CONFIG["hidden_size"],
        CONFIG["num_hidden_layers"],
    )
    assert engine.plan.target == "sm_90"
    assert {choice.op for choice in engine.ops} >= {"attention", "linear", "rms_norm"}
    assert engine.generation.temperature == 0.7
    assert [file.name for file in engine.files] == [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ]


def test_a_sharded_checkpoint_is_referenced_file_by_file(tmp_path: Path) -> None:
    whole = build(write_checkpoint(tmp_path / "whole"), tmp_path / "engine-whole")
    parts = build(write_checkpoint(tmp_path / "parts", n_shards=3), tmp_path / "engine-parts")
    assert len(parts.manifest.weights) == 3
    for left, right in zip(whole.tensors(), parts.tensors(), strict=True):
        assert b"".join(p.read() for p in left.pieces) == b"".join(p.read() for p in right.pieces)
    assert all(check.is_intact for check in parts.verify())


def test_weights_are_split_into_files_of_bounded_size(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sailfish.build.builder._MAX_WEIGHT_FILE_BYTES", 8192)
    bundle = build(checkpoint, tmp_path / "bundle", bundle=True)
    assert len(bundle.manifest.weights) > 1
    assert bundle.manifest.weights[0].path == "weights-00001.bin"
    assert all(check.is_intact for check in bundle.verify())


def test_progress_ends_with_every_byte_done(checkpoint: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    for bundle in (False, True):
        build_engine(
            checkpoint,
            tmp_path / f"engine-{bundle}",
            target="cpu",
            bundle=bundle,
            environ=ENVIRON,
            progress=lambda *step: told.append(step),
        )
        stage, done, total = told[-1]
        assert stage == ("copy" if bundle else "digest")
        assert done == total > 0


def test_a_hub_blob_is_named_by_its_digest_and_is_not_read_again(checkpoint: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub" / "models--acme--tiny"
    snapshot = hub / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for path in checkpoint.iterdir():
        if path.suffix != ".safetensors":
            (snapshot / path.name).write_bytes(path.read_bytes())
    claimed = "0" * 64
    (hub / "blobs" / claimed).write_bytes((checkpoint / "model.safetensors").read_bytes())
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / claimed)
    engine = build(snapshot, tmp_path / "engine")
    assert engine.manifest.name == "acme/tiny"
    assert engine.manifest.weights[0].sha256 == claimed
    assert [check.is_intact for check in engine.verify()][
        0
    ] is False  # verify reads, and does not believe names


EMPTY = {**TOKENIZER, "model": {"type": "BPE", "vocab": {}, "merges": []}}


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [(None, "has no tokenizer.json"), ({}, "is not a tokenizer"), (EMPTY, "holds no tokens")],
)
def test_a_checkpoint_without_a_usable_tokenizer_is_refused_and_nothing_is_left(
    checkpoint: Path, tmp_path: Path, tokenizer: dict[str, object] | None, words: str
) -> None:
    if tokenizer is None:
        (checkpoint / "tokenizer.json").unlink()
    else:
        (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=words):
        build(checkpoint, tmp_path / "engine")
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_a_checkpoint_whose_tensors_do_not_fit_its_config_is_refused_by_name(
    checkpoint: Path, tmp_path: Path
) -> None:
    write_safetensors(checkpoint / "model.safetensors", {"model.embed_tokens.weight": (64, 32)})
    with pytest.raises(CheckpointError, match="model.layers.0"):
        build(checkpoint, tmp_path / "engine")


def test_an_engine_is_not_built_from_an_engine(checkpoint: Path, tmp_path: Path) -> None:
    engine = build(checkpoint, tmp_path / "engine")
    with pytest.raises(CheckpointError, match="is an engine already"):
        build(engine.directory, tmp_path / "again")


def test_an_unknown_target_is_refused_with_the_known_ones(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sm_90"):
        build_engine(checkpoint, tmp_path / "engine", target="sm_12", environ=ENVIRON)


def test_models_are_called_by_their_hub_name_or_their_directory() -> None:
    assert model_name(Path("/c/hub/models--org--some--name/snapshots/1f")) == "org/some--name"
    assert model_name(Path("/models/llama")) == "llama"


def test_the_second_look_finds_what_the_first_built(checkpoint: Path, environ: dict[str, str]) -> None:
    first = locate_engine(checkpoint, environ=environ)
    second = locate_engine(checkpoint, environ=environ)
    assert (first.is_built, first.why) == (True, "built")
    assert (second.is_built, second.why) == (False, "found in the cache")
    assert first.path == second.path
    assert first.path.parent == cache_root(environ)


def test_an_engine_directory_is_returned_as_it_is(
    checkpoint: Path, tmp_path: Path, environ: dict[str, str]
) -> None:
    engine = build(checkpoint, tmp_path / "engine")
    found = locate_engine(engine.directory, environ=environ)
    assert (found.path, found.is_built, found.why) == (engine.directory, False, "given")
    assert not cache_root(environ).exists()


@pytest.mark.parametrize("change", ["weights", "tokenizer", "target"])
def test_whatever_changes_the_engine_changes_its_place_in_the_cache(
    checkpoint: Path, environ: dict[str, str], change: str
) -> None:
    first = locate_engine(checkpoint, environ=environ)
    target = None
    if change == "weights":
        data = bytearray((checkpoint / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (checkpoint / "model.safetensors").write_bytes(data)
    elif change == "tokenizer":
        (checkpoint / "tokenizer.json").write_text(json.dumps(TOKENIZER, indent=1))
    else:
        target = "sm_80"
    second = locate_engine(checkpoint, target=target, environ=environ)
    assert second.is_built and second.path != first.path


def test_settings_of_a_start_find_the_engine_of_another(checkpoint: Path, environ: dict[str, str]) -> None:
    first = locate_engine(checkpoint, EngineConfig(max_sequences=3), environ=environ)
    second = locate_engine(checkpoint, EngineConfig(context_tokens=64), environ=environ)
    assert first.is_built and not second.is_built
    manifest = Artifact.open(second.path).manifest
    assert manifest.requested == EngineConfig(), "a later start without flags gets the defaults"
    assert manifest.plan.max_sequences != 3


def test_a_damaged_cache_entry_is_built_again_and_the_reason_is_told(
    checkpoint: Path, environ: dict[str, str]
) -> None:
    path = locate_engine(checkpoint, environ=environ).path
    (path / "manifest.json").write_bytes(b"{}")
    again = locate_engine(checkpoint, environ=environ)
    assert again.is_built and again.path == path
    assert again.why.startswith("built again, since") and "damaged" in again.why
    assert Artifact.open(path)


def test_builders_of_the_same_engine_wait_and_only_one_builds(
    checkpoint: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first_is_inside, n_builds = threading.Event(), []

    def slow_build(*args: object, **more: object) -> Artifact:
        n_builds.append(1)
        first_is_inside.set()
        return build_engine(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "build_engine", slow_build)
    found: list[cache.FoundEngine] = []

    def look() -> None:
        found.append(locate_engine(checkpoint, environ=environ))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert first_is_inside.is_set() and len(n_builds) == 1
    assert sorted(engine.is_built for engine in found) == [False, False, False, True]


def test_a_cache_that_cannot_be_written_is_told_with_the_variable_to_set(
    checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="XDG_CACHE_HOME"):
        locate_engine(checkpoint, environ={**ENVIRON, "XDG_CACHE_HOME": str(tmp_path / "file")})


def test_the_cache_follows_xdg_and_else_lies_in_the_home() -> None:
    assert cache_root({"XDG_CACHE_HOME": "/x"}) == Path("/x/sailfish/engines")
    assert cache_root({"HOME": "/users/me"}) == Path("/users/me/.cache/sailfish/engines")
    assert cache_root({"XDG_CACHE_HOME": "relative", "HOME": "/h"}) == Path("/h/.cache/sailfish/engines")


def test_the_packaged_model_builds_by_its_name(environ: dict[str, str]) -> None:
    artifact = Artifact.open(find_or_build("books-4m", environ=environ))
    assert artifact.manifest.name == "books-4m"
    assert artifact.weight_path(artifact.manifest.weights[0]) == demo_model() / "model.safetensors"
    assert (
        artifact.manifest.plan.memory_bytes("weights")
        == 4 * sum(a * b for a, b in ((8192, 256), (512, 512), (512, 256), (3072, 256), (512, 768)))
        + 4 * 256 * 5
    )


def test_building_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from sailfish.build.builder import build_engine\n"
        "from sailfish.data import demo_model\n"
        f"print(build_engine(demo_model(), {str(tmp_path / 'engine')!r}, target='sm_80').digest)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) == 64
