"""`sailfish plan`: the memory a model needs, before any weight is read."""

from __future__ import annotations

from sailfish.artifact.reader import Artifact, is_engine
from sailfish.base.sources import environment
from sailfish.build.builder import target_profile
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.cli import opening, tables
from sailfish.cli.options import ENGINE, AsJson, Download, Model, Offline, Settings, Target, with_settings
from sailfish.plan import make_plan, render


@with_settings(ENGINE)
def plan(
    model: Model,
    target: Target = None,
    as_json: AsJson = False,
    offline: Offline = False,
    download: Download = False,
    *,
    settings: Settings,
) -> None:
    """Show weights, KV blocks and every other part of memory; or what would make a too large request fit."""
    directory = opening.locate(model, offline=offline, download=download)
    hardware = target_profile(target, settings.engine.device, environment())
    config = settings.engine
    if is_engine(directory):
        manifest = Artifact.open(directory).manifest
        config, shape = manifest.requested.overruled_by(config), manifest.model
    else:
        shape = load_model_config(directory)
    planned = make_plan(config, shape, hardware)
    if as_json:
        tables.show_json(render.as_data(planned))
        return
    where = "this machine" if hardware.is_here else "from its data sheet"
    rows = [(row.name, row.value, row.why) for row in render.memory_rows(planned)]
    tables.show(f"Memory on {hardware.name} ({where})", ("part", "size", "why"), rows, right=("size",))
    rows = [(row.name, row.value, row.why) for row in render.decision_rows(planned)]
    tables.show("Settings", ("setting", "active", "why"), rows)
