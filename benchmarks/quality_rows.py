"""Measures what each recipe costs a model in quality, and appends the rows to benchmarks/results.

    python benchmarks/quality_rows.py MODEL --calibration FILE --eval FILE [--only CASE ...]

The cases and the figures of other tools are in benchmarks/quality. The parent is read once for all of them;
rows are stored when a case is done, so a run that is cut short keeps what it has.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sailfish.base.sources import environment
from sailfish.bench.quality import Measuring, Table
from sailfish.bench.results import Recorder, command, store
from sailfish.hardware.probe import probe

HERE = Path(__file__).parent


def main() -> None:
    """Measure the cases one after the other."""
    parser = argparse.ArgumentParser(description="Append what each recipe costs a model, a row a figure.")
    parser.add_argument("model", type=Path, help="the parent, a dense checkpoint")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE")
    parser.add_argument("--eval", type=Path, required=True, metavar="FILE")
    parser.add_argument("--windows", type=int, default=150, help="that perplexity is taken over")
    parser.add_argument("--near", type=int, default=40, help="first windows for KL and the same top token")
    parser.add_argument("--tokens", type=int, default=1024, help="of a window")
    parser.add_argument("--only", nargs="+", metavar="CASE")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--cases", type=Path, default=HERE / "quality" / "cases.json")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "quality.jsonl")
    asked = parser.parse_args()
    table = Table.read(asked.cases)
    if asked.model.resolve().name != table.model:
        parser.error(f"the cases are of {table.model}, not of {asked.model.name}")
    unknown = set(asked.only or ()) - {case.name for case in table.cases}
    if unknown:
        parser.error(f"no case is called {', '.join(sorted(unknown))}")
    hardware = probe(asked.device, environ=environment())
    measuring = Measuring(
        source=asked.model,
        calibration=asked.calibration,
        evaluation=asked.eval,
        n_windows=asked.windows,
        n_near=asked.near,
        window_tokens=asked.tokens,
        hardware=hardware,
        recipes=asked.cases.parent,
    )
    recorder = Recorder(
        suite="quality",
        device=hardware.name,
        command=command(["python", "benchmarks/quality_rows.py", *sys.argv[1:]]),
        calibration={},
    )
    for case in table.cases:
        if asked.only is None or case.name in asked.only:
            rows = list(measuring.results(case, measuring.comparison(case, lambda *_: None), recorder))
            store(rows, asked.out)
            for row in rows:
                sys.stdout.write(f"{row.row} {row.value:g} {row.unit} (interval {row.spread:.2g} wide)\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
