"""Finds the engine of a checkpoint in the user's cache, or builds it there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sailfish.artifact.manifest import FORMAT
from sailfish.artifact.reader import Artifact, header_digest, is_engine
from sailfish.base.config import EngineConfig
from sailfish.base.errors import ArtifactError, BuildError, PlanError
from sailfish.base.sources import cache_dir, environment
from sailfish.build.builder import COPIED_FILES, Progress, build_engine, model_name, target_profile
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.checkpoint.hub import HubEnv, resolve
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.data import DEMO_MODEL_NAME, demo_model
from sailfish.plan.formats import config_of, formats_of, words
from sailfish.plan.types import WeightFormats
from sailfish.version import __version__

log = logging.getLogger(__name__)

_KEY_CHARS = 16
_KEY_FILES = ("config.json", "quantize_config.json", "quant_config.json", *COPIED_FILES)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundEngine:
    """An engine that is ready to open."""

    path: Path
    is_built: bool
    """True: built just now. False: it was there."""
    why: str
    """In words: "given", "found in the cache", "built", or why a cached one was built again."""


def locate(
    model: Path | str, environ: Mapping[str, str], *, offline: bool = False, download: bool = False
) -> Path:
    """Return the directory of a path, of a Hub id in the local cache, or of the packaged "books-4m"."""
    if str(model) == DEMO_MODEL_NAME and not Path(model).exists():
        return demo_model()
    return resolve(str(model), env=HubEnv.of(environ), offline=offline, download=download)


def find_or_build(
    model: Path | str, config: EngineConfig | None = None, *, environ: Mapping[str, str] | None = None
) -> Path:
    """Return the engine directory of a path, a Hub id in the local cache, or the packaged "books-4m"."""
    return locate_engine(model, config, environ=environ).path


def locate_engine(
    model: Path | str,
    config: EngineConfig | None = None,
    *,
    target: str | None = None,
    environ: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> FoundEngine:
    """Find the engine in the cache or build it there; builders of the same engine wait for each other.

    An engine directory is returned as it is. A damaged cache entry, or one whose checkpoint changed, is
    built again. Raises CheckpointError, PlanError, ArtifactError or BuildError.
    """
    config = config or EngineConfig()
    environ = environ if environ is not None else environment()
    directory = locate(model, environ)
    if is_engine(directory):
        return FoundEngine(path=directory, is_built=False, why="given")
    hardware = target_profile(target, config.device, environ)
    formats = formats_of(config, load_model_config(directory))
    path = cache_root(environ) / _entry_name(directory, hardware.target, formats)
    with _locked(path):
        why = "built"
        if is_engine(path):
            try:
                Artifact.open(path)
                return FoundEngine(path=path, is_built=False, why="found in the cache")
            except ArtifactError as error:
                why = f"built again, since {error.message}"
                log.warning("cached engine is built again: %s", error.message)
        build = partial(
            build_engine,
            directory,
            path,
            config=config_of(formats),
            target=hardware.target,
            force=True,
            progress=progress,
            environ=environ,
        )
        try:
            build()
        except PlanError:  # without settings it would not fit; with these it may
            build(planned_for=config)
    return FoundEngine(path=path, is_built=True, why=why)


def cache_root(environ: Mapping[str, str]) -> Path:
    """Return where cached engines lie: $XDG_CACHE_HOME/sailfish/engines."""
    return cache_dir(environ) / "engines"


def _entry_name(directory: Path, target: str, formats: WeightFormats) -> str:
    """Name the entry after the model and a digest of all that would change the engine."""
    checkpoint = Checkpoint.open(directory)
    state = hashlib.sha256()
    facts = [
        f"format {FORMAT}, sailfish {__version__}, target {target}, weights {words(formats)}",
        str(Path(os.path.abspath(directory))),
    ]
    for file in sorted(checkpoint.file_bytes):
        status = (directory / file).stat()
        _, sha256 = header_digest(directory / file)
        facts.append(f"{file} {status.st_size} {status.st_mtime_ns} {sha256}")
    for name in _KEY_FILES:
        path = directory / name
        facts.append(
            f"{name} {hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else 'absent'}"
        )
    state.update("\n".join(facts).encode())
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", model_name(Path(os.path.abspath(directory)))).strip("-.")[:64]
    return f"{slug or 'model'}-{state.hexdigest()[:_KEY_CHARS]}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the entry's lock, waiting for another builder of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BuildError(
            f"the engine cache {path.parent} cannot be written: {error.strerror}",
            hint="set XDG_CACHE_HOME to a writable directory, or build with -o",
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
