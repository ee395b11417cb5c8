"""`sailfish doctor`: what is right and wrong on this machine, and the exact fixes."""

from __future__ import annotations

import typer

from sailfish.base.sources import environment
from sailfish.build.cache import cache_root
from sailfish.cli import tables
from sailfish.cli.options import AsJson
from sailfish.hardware import doctor as checks
from sailfish.kernels.cpu import library


def doctor(
    port: int = typer.Option(
        8000, "--port", metavar="PORT", min=0, max=65535, help="The port you mean to serve on."
    ),
    as_json: AsJson = False,
) -> None:
    """Check CPU, kernels, torch, CUDA, Triton, memory, port and caches; exit status 1 when a check fails."""
    environ = environment()
    found = [*checks.diagnose(environ, cache_dir=cache_root(environ), port=port), library.check()]
    if as_json:
        tables.show_json(checks.as_data(found))
    else:
        rows = [(check.verdict, check.name, check.value, check.fix) for check in found]
        tables.show("This machine", ("verdict", "check", "found", "fix"), rows)
    if not checks.is_healthy(found):
        raise typer.Exit(1)
