"""`sailfish bench`: the table of measurements, each in a file of its own."""

from __future__ import annotations

import typer

from sailfish.cli.bench_budget import budget
from sailfish.cli.bench_cpu import cpu
from sailfish.cli.bench_engine import engine
from sailfish.cli.bench_kernels import kernels
from sailfish.cli.bench_server import server

bench = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Measure; append a row for each figure to a file."
)
for name, command, summary in (
    ("engine", engine, "Speed, memory and start of an engine, beside other engines' figures."),
    ("cpu", cpu, "An engine on this CPU in 4, 8 and 16 bits, alone or in turns with llama.cpp."),
    ("kernels", kernels, "Single kernels on this GPU, beside other engines' figures."),
    ("server", server, "Many concurrent streams through HTTP."),
    ("budget", budget, "What each op of a step should take, from bytes and operations alone."),
):
    bench.command(name, short_help=summary)(command)
