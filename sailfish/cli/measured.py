"""What the measuring commands share: their flags, and how a figure is said."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from sailfish.base.config import EngineConfig
from sailfish.bench import peers, results
from sailfish.bench.results import Result
from sailfish.cli.options import ENGINE

_ONLY_HELP = "Measure only rows that contain this (* for anything); may be repeated, or comma-separated."
Only = Annotated[list[str] | None, typer.Option("--only", metavar="ROW", help=_ONLY_HELP)]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Measured runs of each row.")]


def patterns(only: Sequence[str] | None) -> list[str]:
    """Return the patterns of `--only`."""
    return [part for word in only or () for part in word.split(",") if part.strip()]


def command() -> str:
    """Return the command of this process, as a row stores it."""
    return results.command(["sailfish", *sys.argv[1:]])


def flags_of(engine: EngineConfig) -> list[str]:
    """Return the settings as a command line has them; switches keep their default."""
    values = [(row.flag, getattr(engine, row.field)) for row in ENGINE if "/" not in row.flag]
    return [word for flag, value in values if value is not None for word in (flag, str(value))]


def say_calibration(calibration: Mapping[str, float]) -> None:
    """Say what the machine gives, beside what the peers' machine gave."""
    there = peers.calibration()
    for name, value in calibration.items():
        beside = f" (the peers' machine: {there[name]:g})" if name in there else ""
        typer.echo(f"{name} {value:g}{beside}")


def say(result: Result) -> None:
    """Print one figure with its spread, its ideal, its peer and its target."""
    parts = [f"{result.row:50} {result.value:10.5g} {result.unit:9} ±{result.spread:<8.2g}"]
    if result.ideal is not None:
        parts.append(f"ideal {result.ideal:9.4g}")
    known = peers.peer(result.row)
    if result.peer is not None and result.peer_value:
        is_lower = known is not None and known.better == "lower"
        ratio = result.peer_value / result.value if is_lower else result.value / result.peer_value
        parts.append(f"{result.peer} {result.peer_value:g}: {ratio:.2f} x")
    if result.target is not None:
        scale = 1.0 if known is None else known.scale(result.calibration)
        is_met = None if known is None else known.is_met_by(result.value, result.calibration)
        scaled = "" if scale == 1.0 else f", here {result.target * scale:.4g}"
        parts.append(
            f"target {result.target:g}{scaled} {'' if is_met is None else 'met' if is_met else 'MISSED'}"
        )
    if result.launches:
        parts.append(" ".join(f"{name}:{n:g}" for name, n in result.launches.items()))
    elif result.implementation:
        parts.append(result.implementation)
    typer.echo("  ".join(parts))
