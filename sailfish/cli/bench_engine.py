"""`sailfish bench engine`: an engine through its Python API, beside other engines' figures."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from sailfish.artifact.reader import Artifact
from sailfish.base.errors import ConfigError
from sailfish.base.sources import environment
from sailfish.bench import peers
from sailfish.bench.calibrate import calibrate
from sailfish.bench.engine import BATCHES
from sailfish.bench.replay import read_trace
from sailfish.bench.results import Recorder, Result, store
from sailfish.bench.shapes import SHAPES, random_checkpoint
from sailfish.bench.suite import Wanted, keep_as_evidence, run_suite
from sailfish.cli import measured, opening
from sailfish.cli.measured import Only, Repeats
from sailfish.cli.options import ENGINE, Download, Offline, Settings, with_settings
from sailfish.hardware.probe import probe
from sailfish.plan.types import Plan

_OUT = Path("benchmarks/results/engine.jsonl")
_MODEL_HELP = "A checkpoint or engine directory, a Hugging Face id org/name, or books-4m (packaged)."
_SHAPE_HELP = f"Instead of a model, random weights of a shape: {', '.join(SHAPES)}."
_TRACE_HELP = "Replay the requests of Azure's conversation trace: its CSV file, plain or .xz."
_BATCHES = ",".join(map(str, BATCHES))


@with_settings(ENGINE)
def engine(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=_MODEL_HELP)] = None,
    shape: Annotated[str | None, typer.Option("--shape", metavar="SHAPE", help=_SHAPE_HELP)] = None,
    only: Only = None,
    batches: Annotated[str, typer.Option("--batches", help="Batch sizes of the decode rows.")] = _BATCHES,
    repeats: Repeats = 3,
    trace: Annotated[Path | None, typer.Option("--trace", metavar="FILE", help=_TRACE_HELP)] = None,
    out: Annotated[Path, typer.Option("--out", help="File of JSON lines to append to.")] = _OUT,
    offline: Offline = False,
    download: Download = False,
    *,
    settings: Settings,
) -> None:
    """Measure speed, memory and start through the Python API; append a row for each figure to a file."""
    sizes = _numbers(batches)
    if (model is None) == (shape is None):
        raise ConfigError("give either a model or --shape", hint="sailfish bench engine books-4m")
    lengths = read_trace(trace) if trace is not None else []
    source = str(random_checkpoint(shape, environment(), opening.say)) if shape is not None else str(model)
    engine_dir = opening.find(source, settings, offline=offline, download=download)

    device = probe(settings.engine.device, environ=environment())
    recorder = Recorder(
        suite="engine", device=device.name, command=measured.command(), calibration=calibrate(device.device)
    )
    measured.say_calibration(recorder.calibration)
    artifact = Artifact.open(engine_dir)
    start = opening.start_of(artifact, settings.engine)
    wanted = Wanted(
        name=_name(artifact.manifest.name, start.plan),
        device_key=device.key,
        ops=start.ops,
        only=measured.patterns(only),
        repeats=repeats,
        batches=sizes,
        trace=lengths,
    )

    def keep(result: Result) -> None:
        measured.say(result)
        store([result], out)

    rows = asyncio.run(run_suite(engine_dir, settings.engine, recorder, wanted, keep))
    if not rows:
        raise ConfigError("--only picks no row", hint='try --only "decode B=1"')
    keep_as_evidence(engine_dir, rows)
    opening.say(f"appended to {out}, and to the engine's evidence; peers: {peers.source()}")


def _name(model: str, plan: Plan) -> str:
    """Return the model and its formats, as rows are named."""
    formats = plan.formats
    name = f"{model} {plan.dtype if formats.layers == 'plain' else formats.layers}"
    if formats.head == formats.embedding != "plain":
        name += f", {formats.head} head and embedding"
    else:
        kinds = (("head", formats.head), ("embedding", formats.embedding))
        name += "".join(f", {to} {what}" for what, to in kinds if to != "plain")
    return name if plan.kv_dtype == plan.dtype else f"{name}, {plan.kv_dtype} kv"


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--batches {text!r} is no list of numbers", hint="write --batches 1,4,16"
        ) from None
