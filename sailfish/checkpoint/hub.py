"""Find the directory a model name stands for: a path, or a Hub id in the local Hugging Face cache."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sailfish.base.errors import CheckpointError
from sailfish.checkpoint.files import read_json
from sailfish.checkpoint.hf_config import CONFIG_FILE
from sailfish.checkpoint.safetensors_reader import INDEX_FILE, MAX_HEADER_BYTES, SINGLE_FILE

log = logging.getLogger(__name__)

ALLOWED_FILES = ("*.safetensors", "*.json", "*.jinja")
"""What a download may bring: weights, configs and templates; no pickles, no code."""
SKIPPED_FILES = ("consolidated*", "*/*")
"""What would bring the weights a second time, in their maker's own layout or in another format's folder."""

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?"
_HUB_ID = re.compile(rf"{_PART}/{_PART}")
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUE = {"1", "true", "yes", "on"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HubEnv:
    """What the environment says about the Hugging Face cache."""

    cache: Path
    """Directory that holds models--org--name."""
    offline_variable: str | None = None
    """The variable that forbids downloads, where one does."""
    token: str | None = None

    @classmethod
    def of(cls, variables: Mapping[str, str]) -> HubEnv:
        """Read HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME, HOME, HF_TOKEN and the two that forbid downloads."""
        home = Path(variables.get("HOME") or Path.home())
        hf_home = (
            variables.get("HF_HOME")
            or Path(variables.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface"
        )
        cache = variables.get("HF_HUB_CACHE") or Path(hf_home) / "hub"
        forbidding = (key for key in _OFFLINE_VARIABLES if variables.get(key, "").lower() in _TRUE)
        return cls(
            cache=Path(cache).expanduser(),
            offline_variable=next(forbidding, None),
            token=variables.get("HF_TOKEN") or None,
        )


def resolve(name: str, *, env: HubEnv, offline: bool = False, download: bool = False) -> Path:
    """Return the directory of a checkpoint.

    `name` is a directory, or a Hub id `org/name`, whose main branch is looked up in the local cache. Only
    with `download`, and never when `offline` or when the environment forbids it, is it fetched.
    """
    directory = _directory(name)
    if directory is not None:
        return directory
    if not _HUB_ID.fullmatch(name) or ".." in name or "--" in name:
        raise CheckpointError(
            f"{name[:200]!r} is neither a directory nor a Hub id", hint="give a path, or org/name"
        )
    snapshot = _cached(name, env)
    if snapshot is not None:
        return snapshot
    if offline:
        why, hint = "--offline was given", "leave it out to allow --download"
    elif env.offline_variable is not None:
        why = f"{env.offline_variable} is set"
        hint = "unset it to allow --download"
    elif not download:
        why = "downloads happen only when asked for"
        hint = f"add --download, or run sailfish inspect {name} --download once"
    else:
        return _download(name, env)
    raise CheckpointError(f"{name} is not, or not wholly, in the cache {env.cache}, and {why}", hint=hint)


def _directory(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if name and path.is_dir() else None  # pathlib takes "" for the current directory
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, the home of nobody
        return None


def _cached(name: str, env: HubEnv) -> Path | None:
    """Return the snapshot that the main branch points to, if its config and weights are all there."""
    repo = env.cache / f"models--{name.replace('/', '--')}"
    ref = repo / "refs" / "main"
    try:
        commit = ref.read_text(encoding="ascii")[:100].strip() if ref.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{ref} cannot be read: {error}", hint="delete it and download again") from None
    if not re.fullmatch(r"[A-Za-z0-9]{1,64}", commit):
        return None
    snapshot = repo / "snapshots" / commit
    files = {CONFIG_FILE, SINGLE_FILE}
    if (snapshot / INDEX_FILE).exists() and not (snapshot / SINGLE_FILE).exists():
        weight_map = read_json(snapshot / INDEX_FILE, MAX_HEADER_BYTES).get("weight_map")
        shards = weight_map.values() if isinstance(weight_map, dict) else ()
        files = {CONFIG_FILE, *(shard for shard in shards if isinstance(shard, str))}
    return snapshot if all((snapshot / file).exists() for file in files) else None


def _download(name: str, env: HubEnv) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise CheckpointError(
            f"downloading {name} needs huggingface_hub", hint="pip install 'sailfish[hub]'"
        ) from None
    log.info("downloading %s", name)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                cache_dir=env.cache,
                token=env.token,
                allow_patterns=list(ALLOWED_FILES),
                ignore_patterns=list(SKIPPED_FILES),
            )
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{name} could not be downloaded: {reason}",
            hint="check the name, the network and HF_TOKEN, or give a directory",
        ) from None
