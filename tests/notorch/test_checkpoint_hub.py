"""Model names: directories, the Hugging Face cache as it lies on disk, and downloads only when asked."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from checkpoint_fixtures import header_of, safetensors_bytes, write_json

from sailfish.base.errors import CheckpointError
from sailfish.checkpoint.hub import ALLOWED_FILES, SKIPPED_FILES, HubEnv, resolve
from sailfish.checkpoint.safetensors_reader import Checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_cache(tmp_path: Path, *, shards: int = 0) -> HubEnv:
    """A cache as the Hub's client leaves it: blobs, and snapshots of symlinks to them."""
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    write_json(repo / "blobs" / "config", {})
    (repo / "blobs" / "weights").write_bytes(safetensors_bytes(header_of({"w": ("F32", (1,))})))
    (snapshot / "config.json").symlink_to(Path("../../blobs/config"))
    if shards:
        file = "model-00001-of-00001.safetensors"
        write_json(snapshot / "model.safetensors.index.json", {"weight_map": {"w": file}})
    else:
        file = "model.safetensors"
    (snapshot / file).symlink_to(Path("../../blobs/weights"))
    return HubEnv(cache=tmp_path / "hub")


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand in for huggingface_hub and record what is asked of it."""
    asked: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append({"repo_id": repo_id, **options})
        return "downloaded"

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    errors = types.ModuleType("huggingface_hub.errors")
    errors.HfHubHTTPError = type("HfHubHTTPError", (Exception,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return asked


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve(str(tmp_path), env=HubEnv(cache=tmp_path)) == tmp_path


@pytest.mark.parametrize("shards", [0, 1])
def test_a_cached_id_is_its_snapshot(tmp_path: Path, shards: int) -> None:
    env = write_cache(tmp_path, shards=shards)
    found = resolve("org/name", env=env)
    assert found == tmp_path / "hub/models--org--name/snapshots" / COMMIT
    assert found == resolve("org/name", env=env, offline=True)
    assert Checkpoint.open(found).tensors.keys() == {"w"}


@pytest.mark.parametrize("shards", [0, 1])
def test_a_snapshot_without_all_its_weights_is_not_taken(tmp_path: Path, shards: int) -> None:
    env = write_cache(tmp_path, shards=shards)
    (tmp_path / "hub/models--org--name/blobs/weights").unlink()
    with pytest.raises(CheckpointError, match="not wholly, in the cache"):
        resolve("org/name", env=env)


@pytest.mark.parametrize(
    ("options", "variable", "why"),
    [
        ({}, None, "downloads happen only when asked for (add --download, or run sailfish inspect"),
        (
            {"offline": True},
            "HF_HUB_OFFLINE",
            "--offline was given (leave it out to allow --download)",
        ),
        ({"offline": True, "download": True}, None, "--offline was given (leave it out"),
        ({"download": True}, "HF_HUB_OFFLINE", "HF_HUB_OFFLINE is set (unset it to allow --download)"),
        ({}, "TRANSFORMERS_OFFLINE", "TRANSFORMERS_OFFLINE is set (unset it"),
    ],
)
def test_nothing_is_downloaded_unless_asked_and_allowed(
    tmp_path: Path,
    downloads: list[dict[str, Any]],
    options: dict[str, Any],
    variable: str | None,
    why: str,
) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve("org/name", env=HubEnv(cache=tmp_path, offline_variable=variable), **options)
    assert f"in the cache {tmp_path}, and {why}" in str(caught.value) and downloads == []


def test_a_download_brings_weights_and_configs_only(tmp_path: Path, downloads: list[dict[str, Any]]) -> None:
    env = HubEnv(cache=tmp_path, token="secret")
    assert resolve("org/name", env=env, download=True) == Path("downloaded")
    assert downloads == [
        {
            "repo_id": "org/name",
            "cache_dir": tmp_path,
            "token": "secret",
            "allow_patterns": list(ALLOWED_FILES),
            "ignore_patterns": list(SKIPPED_FILES),
        }
    ]


def test_the_hubs_own_client_takes_the_weights_once_by_these_patterns() -> None:
    """Repositories hold the same weights in other layouts; the client's matching crosses folders."""
    utils = pytest.importorskip("huggingface_hub.utils")
    wanted = [
        "config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip
    unwanted = [
        "consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "original/params.json",
        "original/consolidated.00.pth", "onnx/model.safetensors", "fp16/deep/model.safetensors",
        "pytorch_model.bin", "modeling_odd.py", "README.md",
    ]  # fmt: skip
    taken = utils.filter_repo_objects(
        wanted + unwanted, allow_patterns=list(ALLOWED_FILES), ignore_patterns=list(SKIPPED_FILES)
    )
    assert list(taken) == wanted


def test_what_is_cached_is_not_downloaded_again(tmp_path: Path, downloads: list[dict[str, Any]]) -> None:
    assert resolve("org/name", env=write_cache(tmp_path), download=True).name == COMMIT
    assert downloads == []


def test_without_the_extra_the_way_to_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'sailfish\[hub\]'"):
        resolve("org/name", env=HubEnv(cache=tmp_path), download=True)


@pytest.mark.parametrize(
    "name",
    [
        "../../absent", "org/..", "../absent", "org/name/x", "absent", "", " ", "/absent", "org/na me", 
        "a--b/c", "org/.hidden", "~nobody/x", "a\0b/c", "a/" + "b" * 100_000,
    ],
)  # fmt: skip
def test_names_that_are_neither_are_refused(
    tmp_path: Path, name: str, downloads: list[dict[str, Any]]
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError) as caught:
        resolve(name, env=HubEnv(cache=tmp_path / "empty"), download=True)
    assert "\n" not in str(caught.value) and downloads == []


def test_a_ref_cannot_point_out_of_the_cache(tmp_path: Path) -> None:
    env = write_cache(tmp_path)
    (tmp_path / "hub/models--org--name/refs/main").write_text("../../../../etc")
    with pytest.raises(CheckpointError, match="not wholly, in the cache"):
        resolve("org/name", env=env)


@pytest.mark.parametrize(
    ("variables", "cache", "forbidding"),
    [
        ({"HOME": "/h"}, "/h/.cache/huggingface/hub", None),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub", None),
        ({"HOME": "/h", "HF_HOME": "/f"}, "/f/hub", None),
        ({"HF_HOME": "/f", "HF_HUB_CACHE": "/c", "HF_HUB_OFFLINE": "1"}, "/c", "HF_HUB_OFFLINE"),
        (
            {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "YES", "HF_HOME": "/f"},
            "/f/hub",
            "TRANSFORMERS_OFFLINE",
        ),
    ],
)  # fmt: skip
def test_the_environment_is_read_as_the_hub_client_reads_it(
    variables: dict[str, str], cache: str, forbidding: str | None
) -> None:
    env = HubEnv.of(variables)
    assert (env.cache, env.offline_variable, env.token) == (Path(cache), forbidding, None)
