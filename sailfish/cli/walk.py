"""`sailfish walk`: the code one request passes through."""

from __future__ import annotations

from typing import Annotated

import typer

from sailfish.base import trace
from sailfish.bench import walk as measured
from sailfish.data import DEMO_MODEL_NAME


def walk(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model that is asked.")] = DEMO_MODEL_NAME,
    limit: Annotated[
        int, typer.Option("--limit", metavar="LINES", help="Exit with status 1 above it.")
    ] = measured.MAX_LINES,
) -> None:
    """Serve a model, trace one streamed chat request in every process, and print the functions it entered."""
    entered = measured.walk(model)
    for row in entered:
        if any(other.holds(row) for other in entered if other is not row):
            continue  # a comprehension or inner function, seen where its outer function is
        n_lines = row.last_line - row.first_line + 1
        typer.echo(f"sailfish/{row.file}:{row.first_line:<5} {n_lines:4d} lines  {row.function}")
    total = trace.line_count(entered)
    n_files = len({row.file for row in entered})
    typer.echo(f"{total} lines in {n_files} files, in the order of their first entry; the limit is {limit}")
    if total > limit:
        raise typer.Exit(1)
