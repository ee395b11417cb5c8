"""`sailfish build`: a checkpoint becomes an engine directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sailfish.cli import opening
from sailfish.cli.options import ENGINE, Download, Offline, Settings, Target, with_settings


@with_settings(ENGINE)
def build(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="A directory, a Hugging Face id org/name, or books-4m (packaged)."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", help="The engine directory. Default: NAME.engine, in this one."
        ),
    ] = None,
    target: Target = None,
    bundle: Annotated[
        bool,
        typer.Option("--bundle", help="Copy the weights in; else the checkpoint has to stay where it is."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the engine that is there.")] = False,
    offline: Offline = False,
    download: Download = False,
    *,
    settings: Settings,
) -> None:
    """Turn a checkpoint into an engine directory: its settings planned, its ops chosen, its bytes digested.

    serve, generate and chat do this by themselves, in a cache; build to keep, check or ship an engine.
    """
    from sailfish.build.builder import build_engine, model_name

    source = opening.locate(checkpoint, offline=offline, download=download)
    directory = out or Path(f"{model_name(source).rpartition('/')[2]}.engine")
    with opening.progress() as tell:
        artifact = build_engine(
            source,
            directory,
            config=settings.engine,
            target=target,
            bundle=bundle,
            force=force,
            progress=tell,
        )
    typer.echo(f"built {artifact.directory} for {artifact.manifest.target}: {artifact.digest}")
