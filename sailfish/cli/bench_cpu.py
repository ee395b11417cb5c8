"""`sailfish bench cpu`: an engine on this CPU in each set of number formats, alone or beside llama.cpp."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from sailfish.artifact.reader import Artifact
from sailfish.base.errors import ConfigError
from sailfish.base.sources import environment
from sailfish.bench import cpu as bench
from sailfish.bench import cpu_facts
from sailfish.bench.calibrate import calibrate
from sailfish.bench.cpu import Turns
from sailfish.bench.cpu_llama import LlamaCpp
from sailfish.bench.results import Recorder, Result, store
from sailfish.bench.select import is_wanted
from sailfish.bench.shapes import random_checkpoint
from sailfish.build.cache import locate_engine
from sailfish.cli import measured, opening, tables
from sailfish.cli.measured import Only, Repeats
from sailfish.hardware.probe import probe_cpu

_OUT = Path("benchmarks/results/cpu.jsonl")
_QUIET = 0.5
"""Running processes a core beyond which figures say more about them."""
_MODEL_HELP = "A checkpoint, or a Hugging Face id org/name. Default: random weights of Llama-3.2-1B's shape."
_PEERS_HELP = "Measure llama.cpp in turns with us: the folder that benchmarks/cpu_peers.py made."


def cpu(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=_MODEL_HELP)] = None,
    only: Only = None,
    peers: Annotated[Path | None, typer.Option("--peers", metavar="DIR", help=_PEERS_HELP)] = None,
    repeats: Repeats = 3,
    out: Annotated[Path, typer.Option("--out", help="File of JSON lines to append to.")] = _OUT,
) -> None:
    """Measure decode, prefill, start and HTTP on this CPU in 4, 8 and 16 bits; append a row a figure."""
    if model is not None and peers is not None:
        raise ConfigError("the peers have random weights, not MODEL's", hint="leave MODEL out, or --peers")
    name, patterns = model or bench.SHAPE, measured.patterns(only)
    picked = {
        column: [row for row in bench.ROWS if is_wanted(f"{name} {column}: {row}", patterns)]
        for column in bench.COLUMNS
    }
    if not any(picked.values()):
        raise ConfigError("--only picks no row", hint='try --only "int4*: decode B=1"')
    environ = environment()
    source = opening.locate(model) if model else random_checkpoint(bench.SHAPE, environ, opening.say)
    hardware = probe_cpu()
    recorder = Recorder(
        suite="cpu",
        device=f"{hardware.name}, {hardware.n_cores} cores",
        command=measured.command(),
        calibration={"load": cpu_facts.load(), **calibrate("cpu")},
    )
    gives = {name: f"{value:g}" for name, value in recorder.calibration.items()}
    tables.show("This CPU", ("fact", "value"), (cpu_facts.facts(hardware, environ) | gives).items())
    if recorder.calibration["load"] > _QUIET * hardware.n_cores:
        opening.say("this machine is busy: figures will be low, most of all those of threads that spin")
    shown = []

    def keep(column: str, kernels: str, turns: Turns) -> None:
        results = bench.results(recorder, name, column, turns, kernels)
        store(results, out)
        for result in results:
            measured.say(result)
        shown.append(_cells(column, turns, results[-1]))

    for column, rows in picked.items():
        if rows:
            rivals = [] if peers is None else _rivals(peers, column, hardware.n_cores)
            asyncio.run(_measure(source, column, rows, rivals, repeats, partial(keep, column)))
    columns = ("row", "formats", "ours", "others", "ratio to the best", "target")
    tables.show(f"Medians of {repeats} runs", columns, shown, right=columns[2:])
    opening.say(f"appended to {out}; load now {cpu_facts.load():g}, {recorder.calibration['load']:g} before")


def _rivals(folder: Path, column: str, n_threads: int) -> list[LlamaCpp]:
    formats = bench.COLUMNS[column].rivals
    return [LlamaCpp(folder=folder, format=each, n_threads=n_threads) for each in formats]


async def _measure(
    source: Path,
    column: str,
    rows: Sequence[str],
    rivals: Sequence[LlamaCpp],
    repeats: int,
    keep: Callable[[str, Turns], None],
) -> None:
    """Build the engine of a column where it is not cached, and hand each figure on with what did it."""
    config = bench.COLUMNS[column].config
    with opening.progress() as tell:
        engine = locate_engine(source, config, progress=tell)
    opening.say(f"engine {engine.why}: {engine.path}")
    ops = opening.start_of(Artifact.open(engine.path), config).ops
    kernels = ", ".join(sorted({f"{op.op} by {op.implementation}" for op in ops if "linear" in op.op}))
    flags = measured.flags_of(config)
    async for turns in bench.measure(engine.path, config, flags, rivals, rows=rows, repeats=repeats):
        keep(kernels, turns)


def _cells(column: str, turns: Turns, judged: Result) -> tuple[str, ...]:
    """Return a figure as a row of the last table; `judged` has its target: the ratio, or ours alone."""
    ours = f"{median(turns.ours):.4g} {turns.unit}"
    others = ", ".join(f"{name} {median(runs):.4g}" for name, runs in turns.theirs.items())
    ratio = f"{judged.value:.2f} x" if turns.theirs else ""
    target = (
        "" if judged.target is None else f"{judged.target:g} {'met' if bench.is_met(judged) else 'missed'}"
    )
    return turns.row, column, ours, others, ratio, target
