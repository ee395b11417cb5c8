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

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?"
_HUB_ID = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}(?:/[A-Za-z0-9_][A-Za-z0-9._-]{0,99}){0,5}")
_TRUE = {"1", "true", "yes", "on"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HubEnv:
    """What the environment says about the Hugging Face cache."""

    cache: Path
    """Directory that holds models--org--name."""
    offline: bool = False
    """HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is on."""
    token: str | None = None

    @classmethod
    def of(cls, variables: Mapping[str, str]) -> HubEnv:
        """Read HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME, HOME, HF_HUB_OFFLINE and HF_TOKEN."""
        home = Path(variables.get("HOME") or Path.home())
        hf_home = (
            variables.get("HF_HOME")
            or Path(variables.get("XDG_CACHE_HOME") or home / ".cache") / "huggingface"
        )
        cache = variables.get("HF_HUB_CACHE") or Path(hf_home) / "hub"
        offline = any(
            variables.get(key, "").lower() in _TRUE for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        )
        return cls(cache=Path(cache).expanduser(), offline=offline, token=variables.get("HF_TOKEN") or None)


def resolve(
    name: str, *, env: HubEnv, offline: bool = False, download: bool = False, revision: str | None = None
) -> Path:
    """Return the directory of a checkpoint.

    `name` is a directory, or a Hub id `org/name`, looked up at `revision` (default: main) in the local
    cache. Only with `download`, and never when `offline` or `env.offline`, is it fetched.
    """
    directory = _directory(name)
    if directory is not None:
        return directory
    if not _HUB_ID.fullmatch(name) or ".." in name or "--" in name:
        raise CheckpointError(
            f"{name[:200]!r} is neither a directory nor a Hub id", hint="give a path, or org/name"
        )
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise CheckpointError(
            f"{revision[:200]!r} is not a revision", hint="give a branch, a tag or a commit"
        )
    snapshot = _cached(name, env, revision or "main")
    if snapshot is not None:
        return snapshot
    if download and not offline and not env.offline:
        return _download(name, env, revision)
    if offline:
        why = "this is offline"
    elif env.offline:
        why = "HF_HUB_OFFLINE is set"
    else:
        why = "downloads happen only when asked"
    at = f" at revision {revision}" if revision else ""
    raise CheckpointError(
        f"{name}{at} is not, or not wholly, in the cache {env.cache}, and {why}",
        hint="download it, e.g. with --download",
    )


def _directory(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if path.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, the home of nobody
        return None


def _cached(name: str, env: HubEnv, revision: str) -> Path | None:
    """Return the snapshot a branch, tag or commit points to, if its config and weights are all there."""
    repo = env.cache / f"models--{name.replace('/', '--')}"
    ref = repo / "refs" / revision
    try:
        commit = ref.read_text(encoding="ascii")[:100].strip() if ref.is_file() else revision
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


def _download(name: str, env: HubEnv, revision: str | None) -> Path:
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
                revision=revision,
                cache_dir=env.cache,
                token=env.token,
                allow_patterns=list(ALLOWED_FILES),
            )
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{name} could not be downloaded: {reason}") from None
