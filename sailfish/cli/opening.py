"""What most commands begin with: find the model and its engine, and say so."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from sailfish.artifact.reader import Artifact
from sailfish.artifact.start import Start, plan_start
from sailfish.base.config import EngineConfig
from sailfish.base.errors import ConfigError
from sailfish.base.sources import environment
from sailfish.build import cache
from sailfish.build.builder import target_profile
from sailfish.cli.options import Settings


def say(text: str) -> None:
    """Tell the person at the terminal something that is no result."""
    typer.echo(text, err=True)


def locate(model: str, *, offline: bool = False, download: bool = False) -> Path:
    """Return the directory of a model: a path, a hub id, or the packaged model's name."""
    if offline and download:
        raise ConfigError("--offline and --download were both given", hint="give one of them")
    return cache.locate(model, environment(), offline=offline, download=download)


def find(model: str, settings: Settings, *, offline: bool = False, download: bool = False) -> Path:
    """Return the engine directory of a model, built in the cache when it is not there; say which."""
    source = locate(model, offline=offline, download=download)
    with progress() as tell:
        found = cache.locate_engine(source, settings.engine, progress=tell)
    say(f"engine {found.why}: {found.path}")
    return found.path


def start_of(artifact: Artifact, config: EngineConfig) -> Start:
    """Return what an engine would obey if it started on its target now."""
    hardware = target_profile(artifact.manifest.target, config.device, environment())
    return plan_start(artifact, config, hardware)


@contextlib.contextmanager
def progress(*, as_bytes: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Draw a bar on standard error for (stage, done, in all), in bytes or not; nothing where no one looks."""
    if not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    count = DownloadColumn() if as_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield tell
