"""How an error reaches the terminal: one line and an exit code; the traceback only when asked for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import typer

from sailfish.base.errors import SailfishError


@contextlib.contextmanager
def shown(*, debug: bool) -> Iterator[None]:
    """Turn our errors into `error: what happened (what to do)` and their exit code; files' errors too."""
    try:
        yield
    except (SailfishError, OSError) as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code if isinstance(error, SailfishError) else SailfishError.exit_code)
