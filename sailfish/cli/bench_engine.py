"""`sailfish bench engine`: an engine through its Python API, beside other engines' figures."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from sailfish.base.errors import ConfigError
from sailfish.base.sources import environment
from sailfish.bench.calibrate import calibrate
from sailfish.bench.results import Recorder, store
from sailfish.bench.shapes import SHAPES, write_checkpoint
from sailfish.bench.suite import keep_as_evidence, run_suite
from sailfish.build.cache import cache_root
from sailfish.checkpoint.safetensors_reader import INDEX_FILE
from sailfish.cli import opening
from sailfish.cli.options import ENGINE, Download, Model, Offline, Settings, with_settings
from sailfish.hardware.probe import probe

_OUT = Path("benchmarks/results/engine.jsonl")
_RANDOM_HELP = f"Take MODEL as a shape and give it random weights: {', '.join(SHAPES)}."


@with_settings(ENGINE)
def engine(
    model: Model,
    random_weights: Annotated[bool, typer.Option("--random-weights", help=_RANDOM_HELP)] = False,
    batches: Annotated[str, typer.Option("--batches", help="Batch sizes of the decode cases.")] = "1,4,16",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Measured runs of each case.")] = 3,
    out: Annotated[Path, typer.Option("--out", help="File of JSON lines to append to.")] = _OUT,
    offline: Offline = False,
    download: Download = False,
    *,
    settings: Settings,
) -> None:
    """Measure speed and memory through the Python API; append a row for each figure to a file."""
    sizes = _numbers(batches)
    source = str(_random_checkpoint(model)) if random_weights else model
    engine_dir = opening.find(source, settings, offline=offline, download=download)

    device = probe(settings.engine.device, environ=environment())
    recorder = Recorder(
        suite="engine",
        device=device.name,
        command="sailfish " + " ".join(sys.argv[1:]),
        calibration=calibrate(device.device),
    )

    work = run_suite(engine_dir, settings.engine, recorder, batches=sizes, repeats=repeats, say=typer.echo)
    rows = asyncio.run(work)
    store(rows, out)
    keep_as_evidence(engine_dir, rows)
    opening.say(f"appended to {out}, and to the engine's evidence")


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--batches {text!r} is no list of numbers", hint="write --batches 1,4,16"
        ) from None


def _random_checkpoint(shape: str) -> Path:
    """Return a checkpoint of a known shape with random weights, written beside the engine cache once."""
    directory = cache_root(environment()).parent / "shapes" / shape
    if not (directory / INDEX_FILE).exists():
        opening.say(f"writing random weights of shape {shape} to {directory}")
        write_checkpoint(shape, directory)
    return directory
