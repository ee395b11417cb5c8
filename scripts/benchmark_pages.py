"""Writes docs/benchmarks.md, its pictures and the budget of docs/performance.md from what is stored.

    python scripts/benchmark_pages.py

Of each row the latest measurement counts; those before it are dropped from benchmarks/results.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from claims import CLAIMS
from plots import Bars, Lines, bars, lines
from quality_table import section

from sailfish.bench import peers
from sailfish.bench.budget import BATCHES, CASES, Rates, budget
from sailfish.bench.cpu import is_met
from sailfish.bench.kernels.attention import DECODES, PREFILLS
from sailfish.bench.kernels.linear import LAYERS, ROWS
from sailfish.bench.quality import Table
from sailfish.bench.results import Result, latest, prune

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUALITY = ROOT / "benchmarks" / "quality" / "cases.json"
CPU_RESULTS = RESULTS / "cpu.jsonl"
PAGE = ROOT / "docs" / "benchmarks.md"
BUDGET_PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "img"
GPU = "NVIDIA H200"
_BLOCK = "<!-- {0}: written by scripts/benchmark_pages.py -->"
_SHAPES = {"llama-3.1-8b": "Llama-3.1-8B", "llama-2-7b": "Llama-2-7B"}
_EXTRAS = r"(, (int4|int8|fp8) (head|embedding|head and embedding|kv))*"
"""What may stand behind the weights' format in the name of an engine's row."""
_FORMATS = {"bfloat16": "BF16", "int4": "INT4", "fp8": "FP8", "int8": "INT8"}
_MOST_KERNELS = 8
"""Of a traced step, the longest ones; the others are in the stored row."""


def main() -> None:
    """Write everything that can be written of what is stored."""
    paths = sorted(RESULTS.glob("*.jsonl"))
    for path in paths:
        prune(path)
    rows = {row.row: row for path in paths for row in latest(path)}
    of_gpu = {name: row for name, row in rows.items() if row.device == GPU or row.suite == "server"}
    IMAGES.mkdir(exist_ok=True)
    sections = [*_engines(of_gpu), *_steps(of_gpu), *_claims(of_gpu), *_kernels(of_gpu), *_streams(rows)]
    if CPU_RESULTS.exists():
        sections += _cpu(latest(CPU_RESULTS))
    sections += section(rows, Table.read(QUALITY))
    PAGE.write_text("\n".join([*_head(of_gpu), *_verdicts(of_gpu), *sections]) + "\n", encoding="utf-8")
    measured = {name: row.value for name, row in of_gpu.items()}
    text = BUDGET_PAGE.read_text(encoding="utf-8")
    text = _replaced(text, "budget", "\n".join(_budgets(measured)))
    BUDGET_PAGE.write_text(text, encoding="utf-8")


def _head(rows: dict[str, Result]) -> list[str]:
    dates = sorted({row.date for row in rows.values()})
    commits = sorted({row.commit for row in rows.values() if row.commit})
    return [
        "# Benchmarks",
        "",
        "Every figure here is a row of [benchmarks/results](../benchmarks/results) with its command, device, "
        "calibration, versions and commit; `scripts/benchmark_pages.py` writes this page. "
        f"Dates: {dates[0]} to {dates[-1]}; commits: {', '.join(commits)}."
        if dates
        else "",
        "",
        f"Peers: {peers.source()}. They ran on another card of the same kind, so each run of ours first "
        "measures what its own card reads and multiplies per second, and targets are scaled with that.",
        "",
        "Reproduce: `benchmarks/all_rows.sh`, or a part of it: `sailfish bench kernels`, `sailfish bench "
        "engine --shape llama-3.1-8b --weights int4`, `sailfish bench server --step-ms 15 --api-processes "
        "8`; `--only` picks rows. A row is the median of its runs, its spread the largest less the smallest; "
        "it is void if the kernels that it names were not launched. How each was made fast, and what was "
        "predicted before: [performance](performance.md).",
        "",
    ]


def _verdicts(rows: dict[str, Result]) -> list[str]:
    """Return how many targets are met, and the rest one by one."""
    n_met, missed, unmeasured = 0, [], []
    for name in peers.names():
        known = peers.peer(name)
        if known is None or known.target is None:
            continue
        row = rows.get(name)
        if row is None:
            unmeasured.append(name)
        elif known.is_met_by(row.value, row.calibration):
            n_met += 1
        else:
            target = known.target * known.scale(row.calibration)
            ratio = target / row.value if known.better == "lower" else row.value / target
            off = f"{100 * (1 - ratio):.1f}%"
            missed.append(f"| {name} | {_number(row.value)} {row.unit} | {_number(target)} | {off} |")
    for claim in CLAIMS:
        ratio = claim.ratio(rows)
        if claim.wanted is None:
            continue
        if ratio is None:
            unmeasured.append(claim.title)
        elif claim.is_met_by(ratio):
            n_met += 1
        else:
            off = f"{100 * abs(1 - ratio / claim.wanted):.1f}%"
            missed.append(f"| {claim.title} | {ratio:.3g} | {claim.wanted:.3g} | {off} |")
    n_measured = n_met + len(missed)
    found = [f"**{n_met} of {n_measured} targets met.**", ""]
    if missed:
        table = ["| missed | figure | target, scaled to the card | short by |", "|---|---|---|---|", *missed]
        found += [*table, ""]
    if unmeasured:
        found += [f"Not measured: {'; '.join(unmeasured)}.", ""]
    return found


# Engines.


def _engines(rows: dict[str, Result]) -> list[str]:
    found = []
    for shape, name in _SHAPES.items():
        for weights, title in _FORMATS.items():
            picked = _named(rows, rf"{re.escape(shape)} {weights}{_EXTRAS}: ")
            if picked:
                found += [f"## {name}, {title}", "", *_table(picked), "", *_launches(picked)]
    return [*_decode_picture(rows), *found] if found else []


def _named(rows: dict[str, Result], pattern: str) -> list[Result]:
    """Return the rows whose names begin with a pattern, in the order of the peers' table."""
    order = {name: i for i, name in enumerate(peers.names())}
    picked = [row for name, row in rows.items() if re.match(pattern, name)]
    return sorted(picked, key=lambda row: order.get(row.row, len(order)))


def _launches(picked: Sequence[Result]) -> list[str]:
    """Return a line on how many kernels a decode step launches, and what fell back."""
    counts = [
        f"{row.row.rpartition('=')[2]}: {sum(row.launches.values()):g}" for row in picked if row.launches
    ]
    lines_ = [f"Launches of a captured step by batch: {', '.join(counts)}.", ""] if counts else []
    downgrades = sorted({text for row in picked for text in row.downgrades})
    return lines_ + ([f"Downgrades: {'; '.join(downgrades)}.", ""] if downgrades else [])


def _steps(rows: dict[str, Result]) -> list[str]:
    """Return what traced decodes spend their time on."""
    found = []
    for name, row in rows.items():
        if row.kernel_us and "gpu idle" in name:
            parts = [f"{kernel} {us:.0f}" for kernel, us in list(row.kernel_us.items())[:_MOST_KERNELS]]
            title, _, what = name.partition(": gpu idle ")
            found.append(f"| {title}, {what} | {row.value:.2f}% | {', '.join(parts)} |")
    if not found:
        return []
    return [
        "## Where a decode step's time goes",
        "",
        "A profiler's trace of the engine process under requests. A kernel that begins before the last one "
        "has ended counts from its beginning, so the sum may exceed the step.",
        "",
        "| step | GPU idle | us a step of each kernel |",
        "|---|---|---|",
        *found,
        "",
    ]


def _claims(rows: dict[str, Result]) -> list[str]:
    """Return ratios between rows of our own, and to plain PyTorch."""
    found = ["| claim | ratio | wanted | | of | to |", "|---|---|---|---|---|---|"]
    for claim in CLAIMS:
        ratio = claim.ratio(rows)
        if ratio is not None:
            verdict = {None: "", True: "met", False: "missed"}[claim.is_met_by(ratio)]
            cells = [claim.title, f"{ratio:.3g}", claim.target, verdict, claim.of, claim.to]
            found.append(f"| {' | '.join(cells)} |")
    return ["## Against ourselves and plain PyTorch", "", *found, ""] if len(found) > 2 else []


def _decode_picture(rows: dict[str, Result]) -> list[str]:
    groups: list[Bars] = []
    for shape, weights in CASES:
        pairs = []
        for batch in BATCHES:
            name = f"{shape} {weights}: decode B={batch}"
            known = peers.peer(name)
            best = known.best() if known is not None else None
            if name in rows and best is not None:
                pairs.append((f"B={batch}", rows[name].value / best[1]))
        if pairs:
            groups.append(Bars(title=f"{_SHAPES[shape]} {_FORMATS[weights]}", values=pairs))
    if not groups:
        return []
    (IMAGES / "bench-decode.svg").write_text(
        bars("Decode, tokens per second, against vLLM 0.26 = 1", groups, reference=1.0), encoding="utf-8"
    )
    return ["![Decode rates of each format and batch, divided by vLLM's](img/bench-decode.svg)", ""]


# Kernels.


def _kernels(rows: dict[str, Result]) -> list[str]:
    found = [*_linear_picture(rows), *_ratio_table(rows), *_linear_table(rows)]
    for title, names in (
        ("Paged decode attention", [f"decode attention {b} x {n}" for b, n in DECODES]),
        ("Prefill attention", [f"prefill attention {b} x {n}" for b, n in PREFILLS]),
    ):
        picked = _named(rows, rf"({'|'.join(map(re.escape, names))}) [^()]*$")
        if picked:
            found += [f"## {title}", "", *_table(picked), ""]
    fused = _named(rows, r"((add_)?rms_norm|act_mul|rope_write|embed|sample)\b[^()]*$")
    if fused:
        found += ["## Between the products", "", *_table(fused), ""]
    return ["# Kernels", "", *found] if found else []


def _ratio_table(rows: dict[str, Result]) -> list[str]:
    picked = _named(rows, "w4a16 M")
    return ["## W4A16, geometric means over the four layers", "", *_table(picked), ""] if picked else []


def _linear_table(rows: dict[str, Result]) -> list[str]:
    if not any(key.startswith("w4a16 ") for key in rows):
        return []
    lines_ = [
        "| layer | M | ours us | ideal | cuBLAS bf16 here | Marlin | Machete |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer in LAYERS:
        for m in ROWS:
            row = rows.get(f"w4a16 {layer} M={m}")
            if row is None:
                continue
            known = peers.peer(row.row)
            others = known.peers if known is not None else {}
            cublas = rows.get(f"cublas bf16 {layer} M={m}")
            cells = [
                layer,
                str(m),
                f"{row.value:g} ± {row.spread:.2g}",
                "" if row.ideal is None else f"{row.ideal:.3g}",
                "" if cublas is None else f"{cublas.value:.4g}",
                *(f"{others[name]:.4g}" if name in others else "" for name in ("Marlin", "Machete")),
            ]
            lines_.append(f"| {' | '.join(cells)} |")
    return ["## W4A16, group 128", "", *lines_, ""]


def _linear_picture(rows: dict[str, Result]) -> list[str]:
    panels = []
    for layer, (n_out, n_in) in LAYERS.items():
        ours = [(m, rows[name].value) for m in ROWS if (name := f"w4a16 {layer} M={m}") in rows]
        if not ours:
            continue
        series = {"Sailfish": ours}
        for name in ("Marlin", "Machete"):
            known = [(m, found.peers[name]) for m in ROWS if (found := peers.peer(f"w4a16 {layer} M={m}"))]
            series[name] = known
        series["cuBLAS bf16"] = [
            (m, rows[name].value) for m in ROWS if (name := f"cublas bf16 {layer} M={m}") in rows
        ]
        ideal = [(m, row.ideal) for m in ROWS if (row := rows.get(f"w4a16 {layer} M={m}")) and row.ideal]
        series["ideal"] = [(m, value) for m, value in ideal if value is not None]
        panels.append(Lines(title=f"{layer}  {n_in} x {n_out}", series=series))
    if not panels:
        return []
    (IMAGES / "bench-w4a16.svg").write_text(
        lines("W4A16 linear, microseconds by rows of activations (both axes logarithmic)", panels),
        encoding="utf-8",
    )
    return [
        "![Each layer's 4-bit product by rows, beside Marlin, Machete and cuBLAS](img/bench-w4a16.svg)",
        "",
    ]


# Streams.


def _streams(rows: dict[str, Result]) -> list[str]:
    picked = [row for row in rows.values() if row.suite == "server"]
    return ["# Streams over HTTP", "", *_table(picked), ""] if picked else []


# The CPU.


def _cpu(rows: Sequence[Result]) -> list[str]:
    """Return what each machine's CPU reached, beside llama.cpp on the same cores in turns."""
    found = []
    for device in dict.fromkeys(row.device for row in rows):
        of_device = {row.row: row for row in rows if row.device == device}
        ours = [row for row in of_device.values() if row.implementation]
        gives = ", ".join(f"{name} {value:g}" for name, value in ours[0].calibration.items())
        found += [
            f"## {device}",
            "",
            f"`{ours[0].command}`, {ours[0].date}, commit {ours[0].commit}; when it began: {gives}.",
            "",
            "| row | ours | spread | best other | ratio, turn by turn | target | |",
            "|---|---|---|---|---|---|---|",
            *(_cpu_line(row, of_device.get(f"{row.row}, over {row.peer}")) for row in ours),
            "",
        ]
    return [
        "# On the CPU",
        "",
        "`make bench-cpu-peers`: llama.cpp, built here with all that this CPU has, and our engine measured "
        "in turns on the same cores with weights of the same shape. Ours goes through scheduler, sampling "
        "and detokenisation, llama-bench does not; over HTTP both answer the same client.",
        "",
        *found,
    ]


def _cpu_line(row: Result, ratio: Result | None) -> str:
    judged = ratio or row
    cells = [
        row.row,
        f"{_number(row.value)} {row.unit}",
        _number(row.spread, digits=2),
        "" if row.peer is None else f"{row.peer}: {_number(row.peer_value or 0.0)}",
        "" if ratio is None else f"{ratio.value:.2f} x",
        "" if judged.target is None else f"{judged.target:g} {judged.unit}",
        {None: "", True: "met", False: "missed"}[is_met(judged)],
    ]
    return f"| {' | '.join(cells)} |"


# Tables.


def _table(rows: Iterable[Result]) -> list[str]:
    found = ["| row | figure | spread | peer | against it | target | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        known = peers.peer(row.row)
        ratio = ""
        if row.peer_value:
            is_lower = known is not None and known.better == "lower"
            ratio = f"{row.peer_value / row.value if is_lower else row.value / row.peer_value:.2f} x"
        target, verdict = "", ""
        if row.target is not None:
            scale = 1.0 if known is None else known.scale(row.calibration)
            scaled = "" if abs(scale - 1) < 0.005 else f" (here {_number(row.target * scale)})"
            target = f"{_number(row.target)}{scaled}"
            is_met = None if known is None else known.is_met_by(row.value, row.calibration)
            verdict = "" if is_met is None else "met" if is_met else "missed"
        cells = [
            row.row,
            f"{_number(row.value)} {row.unit}",
            _number(row.spread, digits=2),
            "" if row.peer is None else f"{row.peer}: {_number(row.peer_value or 0.0)}",
            ratio,
            target,
            verdict,
        ]
        found.append(f"| {' | '.join(cells)} |")
    return found


def _number(value: float, digits: int = 4) -> str:
    """Return a figure with so many digits, and never in powers of ten."""
    return f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def _budgets(measured: dict[str, float]) -> list[str]:
    """Return a table for each shape and format: a call of each op as predicted and as measured."""
    rates = Rates()
    found = [
        f"Rates: {rates.read_gb_per_s:g} GB/s read, {rates.bf16_tflop_per_s:g} TFLOP/s bf16 (twice that in "
        f"8 bits), {rates.floor_us:g} us for a kernel beyond its bytes. Cells: us of one call, predicted, "
        "and / measured where it was measured alone.",
        "",
    ]
    for shape, weights in CASES:
        budgets = [budget(shape, weights, batch) for batch in BATCHES]
        found += [f"### {_SHAPES[shape]}, {_FORMATS[weights]}", ""]
        found.append(f"| op | calls | {' | '.join(f'B = {batch}' for batch in BATCHES)} |")
        found.append("|---|---|" + "---|" * len(BATCHES))
        for ops in zip(*(each.ops for each in budgets), strict=True):
            cells = [
                f"{op.predicted_us(rates):.1f}" + (f" / {measured[op.row]:.1f}" if op.row in measured else "")
                for op in ops
            ]
            found.append(f"| {ops[0].name} | {ops[0].n_calls} | {' | '.join(cells)} |")
        sums: Sequence[tuple[str, list[float | None]]] = (
            ("least possible", [each.limit_us(rates) for each in budgets]),
            ("step, predicted", [each.step_us(rates) for each in budgets]),
            ("step, sum of measured calls", [each.measured_us(measured) for each in budgets]),
            ("step, measured end to end", [_step_us(str(each), each.batch, measured) for each in budgets]),
            ("target", [each.target_us for each in budgets]),
            ("vLLM 0.26", [each.peer_us for each in budgets]),
        )
        for name, values in sums:
            if all(value is None for value in values):
                continue
            cells = ["-" if value is None else f"{value:.0f}" for value in values]
            found.append(f"| **{name}** | | {' | '.join(cells)} |")
        found.append("")
    return found


def _step_us(row: str, batch: int, measured: dict[str, float]) -> float | None:
    return 1e6 * batch / measured[row] if row in measured else None


def _replaced(text: str, name: str, content: str) -> str:
    """Put `content` between the marks of a block."""
    begin, end = _BLOCK.format(name), _BLOCK.format(f"end of {name}")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{content}\n{end}{after}"


if __name__ == "__main__":
    main()
