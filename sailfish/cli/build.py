"""`sailfish build`: a checkpoint becomes an engine directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sailfish.cli import opening
from sailfish.cli.options import ENGINE, Download, Offline, Settings, with_settings

_TARGET_HELP = "cpu, sm_80, sm_86, sm_89 or sm_90, present here or not. Default: this machine."


@with_settings(ENGINE)
def build(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint directory, a hub id, or books-4m (packaged).")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The engine directory. Default: ./<name>.engine.")
    ] = None,
    target: Annotated[str | None, typer.Option("--target", help=_TARGET_HELP)] = None,
    bundle: Annotated[
        bool, typer.Option("--bundle", help="Copy the weights in, instead of naming them.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an engine of that name.")] = False,
    offline: Offline = False,
    download: Download = False,
    *,
    settings: Settings,
) -> None:
    """Build an engine: plan, choose, digest, commit. Works on a machine without the target device."""
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
