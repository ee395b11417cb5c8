"""`sailfish bench budget`: what each op of a decode step should take, beside what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sailfish.base.errors import ConfigError
from sailfish.bench import budget as budgets
from sailfish.bench.budget import BATCHES, CASES, Budget, Rates
from sailfish.bench.results import latest
from sailfish.bench.select import is_wanted
from sailfish.cli import tables
from sailfish.cli.measured import Only, patterns

_RESULTS = Path("benchmarks/results/kernels.jsonl")
_RATES = Rates()


def budget(
    only: Only = None,
    read: Annotated[float, typer.Option("--read", help="Read bandwidth in GB/s.")] = _RATES.read_gb_per_s,
    product: Annotated[
        float, typer.Option("--product", help="Rate of a large bf16 product in TFLOP/s.")
    ] = _RATES.bf16_tflop_per_s,
    floor: Annotated[float, typer.Option("--floor", help="Least time of a kernel in us.")] = _RATES.floor_us,
    results: Annotated[Path, typer.Option("--results", help="Kernel measurements to set beside.")] = _RESULTS,
) -> None:
    """Show what each op of a decode step should take, from bytes and operations alone."""
    rates = Rates(read_gb_per_s=read, bf16_tflop_per_s=product, floor_us=floor)
    measured = {row.row: row.value for row in latest(results)} if results.exists() else {}
    wanted = [
        found
        for shape, weights in CASES
        for batch in BATCHES
        if is_wanted(str(found := budgets.budget(shape, weights, batch)), patterns(only))
    ]
    if not wanted:
        raise ConfigError("--only picks no budget", hint='try --only "8b int4: decode B=1"')
    for found in wanted:
        _show(found, rates, measured)


def _show(found: Budget, rates: Rates, measured: dict[str, float]) -> None:
    rows = [
        (
            op.name,
            str(op.n_calls),
            f"{op.n_bytes / 1e6:.2f}",
            f"{op.limit_us(rates):.2f}",
            f"{op.predicted_us(rates):.2f}",
            f"{measured[op.row]:.2f}" if op.row in measured else "",
            f"{op.n_calls * op.predicted_us(rates):.0f}",
            f"{op.n_calls * measured[op.row]:.0f}" if op.row in measured else "",
        )
        for op in found.ops
    ]
    whole = found.measured_us(measured)
    step = f"{found.step_us(rates):.0f}"
    rows.append(
        ("the step", "", "", f"{found.limit_us(rates):.0f}", "", "", step, f"{whole:.0f}" if whole else "")
    )
    columns = (
        "op",
        "calls",
        "MB",
        "limit us",
        "predicted us",
        "measured us",
        "step, predicted",
        "step, measured",
    )
    target = "none" if found.target_us is None else f"{found.target_us:.0f} us"
    peer = "none" if found.peer_us is None else f"{found.peer_us:.0f} us"
    tables.show(f"{found}: target {target}, best peer {peer}", columns, rows, right=columns[1:])
