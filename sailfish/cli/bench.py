"""`sailfish bench`: prefill and decode of an engine, measured and stored."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from sailfish.bench import engine as measured
from sailfish.cli import opening
from sailfish.cli.options import ENGINE, Download, Model, Offline, Settings, with_settings
from sailfish.engine.client import AsyncEngine


@with_settings(ENGINE)
def bench(
    model: Model,
    batches: Annotated[str, typer.Option("--batches", help="Batch sizes of the decode cases.")] = "1,4,16",
    repeats: Annotated[int, typer.Option("--repeats", help="Measured runs of each case.")] = 3,
    out: Annotated[Path, typer.Option("--out", help="File of JSON lines to append to.")] = Path(
        "benchmarks/results/engine.jsonl"
    ),
    offline: Offline = False,
    download: Download = False,
    *,
    settings: Settings,
) -> None:
    """Measure prefill and decode through the Python API; append a row a case to a file."""
    engine_dir = opening.find(model, settings, offline=offline, download=download)
    sizes = [int(size) for size in batches.split(",")]
    command = "sailfish " + " ".join(sys.argv[1:])

    async def run() -> list[measured.Row]:
        rows = []
        async with await AsyncEngine.start(engine_dir, config=settings.engine) as engine:
            cases = measured.cases_for(engine.info.context_tokens, engine.info.max_sequences, sizes)
            name = opening.device_name(engine.info.device)
            async for row in measured.measure(
                engine, cases, repeats=repeats, device_name=name, command=command
            ):
                rows.append(row)
                decode = "" if row.decode_tok_s is None else f"decode {row.decode_tok_s:10.1f} tokens/s  "
                typer.echo(
                    f"{row.case:8s} batch {row.batch:4d}  prefill {row.prefill_tok_s:10.1f} tokens/s  "
                    f"{decode}first token {row.ttft_ms:.1f} ms"
                )
        return rows

    measured.store(asyncio.run(run()), out)
    opening.say(f"appended to {out}")
