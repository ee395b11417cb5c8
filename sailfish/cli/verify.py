"""`sailfish verify`: every byte of an engine against its digests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sailfish.artifact.reader import Artifact
from sailfish.base.errors import ArtifactError
from sailfish.base.units import format_bytes
from sailfish.cli import opening


def verify(engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="An engine directory.")]) -> None:
    """Read every file of an engine and compare it with its digest; the exit status is 2 when one changed."""
    artifact = Artifact.open(engine)
    with opening.progress() as tell:
        checks = artifact.verify(lambda done, total: tell("verify", done, total))
    for check in checks:
        typer.echo(
            f"{'intact ' if check.is_intact else 'CHANGED'}  {format_bytes(check.n_bytes):>9}  {check.path}"
        )
    changed = [check for check in checks if not check.is_intact]
    if changed:
        raise ArtifactError(f"{len(changed)} of {len(checks)} files changed", hint="build the engine again")
    typer.echo(f"engine {artifact.digest} is intact")
