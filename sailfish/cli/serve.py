"""`sailfish serve`: a model behind OpenAI's API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sailfish.base import log, trace
from sailfish.cli import opening, serving
from sailfish.cli.options import ENGINE, SERVE, Download, Model, Offline, Settings, with_settings
from sailfish.serve.server import bind


@with_settings(SERVE, ENGINE)
def serve(
    model: Model,
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", help="Jinja file to use instead of the model's own.")
    ] = None,
    log_level: Annotated[str, typer.Option("--log-level", help=f"One of {', '.join(log.LEVELS)}.")] = "info",
    log_json: Annotated[bool, typer.Option("--log-json", help="Log JSON lines.")] = False,
    trace_to: Annotated[Path | None, typer.Option("--trace-to", hidden=True)] = None,
    offline: Offline = False,
    download: Download = False,
    *,
    settings: Settings,
) -> None:
    """Find or build the model's engine, serve it, and print READY with the address. Ctrl-C drains."""
    log.configure(level=log_level, as_json=log_json)
    if trace_to is not None:
        trace.start(trace_to)
    with bind(settings.serve) as listener:
        engine_dir = opening.find(model, settings, offline=offline, download=download)
        serving.serve_engine(
            engine_dir,
            settings,
            listener,
            chat_template=chat_template,
            trace_to=trace_to,
            log_level=log_level,
            log_json=log_json,
        )
