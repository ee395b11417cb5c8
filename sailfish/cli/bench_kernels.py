"""`sailfish bench kernels`: single kernels, captured in CUDA graphs, beside other engines' figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sailfish.base.sources import environment
from sailfish.bench import peers
from sailfish.bench.calibrate import calibrate
from sailfish.bench.results import Recorder, Result, store
from sailfish.cli import measured
from sailfish.cli.measured import Only, Repeats
from sailfish.hardware.probe import probe

_OUT = Path("benchmarks/results/kernels.jsonl")


def kernels(
    only: Only = None,
    alternatives: Annotated[
        bool,
        typer.Option("--alternatives", help="Also what engines do not choose here, plain torch included."),
    ] = False,
    repeats: Repeats = 3,
    out: Annotated[Path, typer.Option("--out", help="File of JSON lines to append to.")] = _OUT,
) -> None:
    """Measure the kernels that engines choose on this GPU; append a row for each figure to a file."""
    from sailfish.bench.kernels import suite

    hardware = probe("cuda", environ=environment())
    recorder = Recorder(
        suite="kernels", device=hardware.name, command=measured.command(), calibration=calibrate("cuda")
    )
    measured.say_calibration(recorder.calibration)

    def keep(result: Result) -> None:
        measured.say(result)
        store([result], out)

    results = suite.run(
        recorder,
        hardware.target,
        only=measured.patterns(only),
        alternatives=alternatives,
        repeats=repeats,
        say=keep,
    )
    typer.echo(f"{len(results)} rows appended to {out}; peers: {peers.source()}", err=True)
