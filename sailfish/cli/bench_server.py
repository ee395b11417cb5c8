"""`sailfish bench server`: many concurrent streams through HTTP."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sailfish.base.sources import environment
from sailfish.bench import streams
from sailfish.bench.results import Recorder, store
from sailfish.cli import measured, opening
from sailfish.cli.measured import Repeats
from sailfish.cli.options import ENGINE, Settings, with_settings
from sailfish.hardware.probe import probe, probe_cpu

_OUT = Path("benchmarks/results/server.jsonl")
_MODEL_HELP = "A checkpoint or engine directory, a Hugging Face id org/name, or books-4m (packaged)."
_STEP_HELP = "Serve no model but random tokens, a step each so long: what the API side carries by itself."


@with_settings(ENGINE)
def server(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help=_MODEL_HELP)] = "books-4m",
    n_streams: Annotated[int, typer.Option("--streams", min=1, help="Streams open at once.")] = 1024,
    n_out: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of each answer.")] = 128,
    n_processes: Annotated[
        int, typer.Option("--api-processes", min=1, metavar="N", help="Processes that speak HTTP.")
    ] = 1,
    step_ms: Annotated[float | None, typer.Option("--step-ms", min=0.1, help=_STEP_HELP)] = None,
    repeats: Repeats = 3,
    out: Annotated[Path, typer.Option("--out", help="File of JSON lines to append to.")] = _OUT,
    *,
    settings: Settings,
) -> None:
    """Hold many streamed completions open at once; append what came, when and at what cost to a file."""
    engine = settings.engine
    if engine.max_sequences is None:
        engine = replace(engine, max_sequences=n_streams)
    if step_ms is not None:
        engine = replace(engine, device="cpu")  # which serves the tokenizer only
    engine_dir = opening.find(model, replace(settings, engine=engine))
    if step_ms is not None:
        device = probe_cpu()
        serving = streams.paced_server(engine_dir, n_processes, n_streams, step_ms)
        name = f"steps of {step_ms:g} ms"
    else:
        device = probe(engine.device, environ=environment())
        serving = streams.real_server(str(engine_dir), n_processes, measured.flags_of(engine))
        name = engine_dir.name
    recorder = Recorder(suite="server", device=device.name, command=measured.command(), calibration={})
    with serving as running:
        runs = [streams.carry(running, engine_dir, n_streams, n_out, seed) for seed in range(repeats)]
    processes = "1 API process" if n_processes == 1 else f"{n_processes} API processes"
    name = f"{name}, {n_streams} streams, {processes} on {probe_cpu().n_cores} cores"
    rows = []
    for figures in zip(*(run.figures() for run in runs), strict=True):
        row, _, unit = figures[0]
        rows.append(recorder.result(f"{name}: {row}", [value for _, value, _ in figures], unit))
        measured.say(rows[-1])
    store(rows, out)
