"""`sailfish plan`: the memory a model needs, before any weight is read."""

from __future__ import annotations

from typing import Annotated

import typer

from sailfish.artifact.reader import Artifact, is_engine
from sailfish.base.sources import environment
from sailfish.build.builder import target_profile
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.cli import opening, tables
from sailfish.cli.options import ENGINE, AsJson, Download, Model, Offline, Settings, with_settings
from sailfish.plan import make_plan, render

_TARGET_HELP = "cpu, sm_90 and the like, or a card such as h200; need not be here. Default: this machine."


@with_settings(ENGINE)
def plan(
    model: Model,
    target: Annotated[str | None, typer.Option("--target", help=_TARGET_HELP)] = None,
    as_json: AsJson = False,
    offline: Offline = False,
    download: Download = False,
    *,
    settings: Settings,
) -> None:
    """Show weights, KV blocks and every other part of memory; or what would make a too large request fit."""
    directory = opening.locate(model, offline=offline, download=download)
    hardware = target_profile(target, settings.engine.device, environment())
    if is_engine(directory):
        config = Artifact.open(directory).manifest.model
    else:
        config = load_model_config(directory)
    planned = make_plan(settings.engine, config, hardware)
    if as_json:
        tables.show_json(render.as_data(planned))
        return
    where = "this machine" if hardware.is_here else "from its data sheet"
    rows = [(row.name, row.value, row.why) for row in render.memory_rows(planned)]
    tables.show(f"Memory on {hardware.name} ({where})", ("part", "size", "why"), rows, right=("size",))
    rows = [(row.name, row.value, row.why) for row in render.decision_rows(planned)]
    tables.show("Settings", ("setting", "active", "why"), rows)
