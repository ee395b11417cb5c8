"""Writes what each recipe costs in quality, beside other tools' files of the same model, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from sailfish.bench.quality import Case, Metric, Table, row_name
from sailfish.bench.results import Result

_SHOWN: dict[Metric, str] = {"perplexity": "perplexity", "kl": "KL", "top1": "same top, %"}
_WORDS: dict[Metric, str] = {**_SHOWN, "increase": "increase, %"}


def section(rows: Mapping[str, Result], table: Table) -> list[str]:
    """Return a table of the cases that were measured, and which of the others were not."""
    lines, n_met, n_judged, unmeasured = [], 0, 0, []
    for case in table.cases:
        measured = {metric: rows.get(row_name(table.model, case, metric)) for metric in _WORDS}
        if None in measured.values():
            unmeasured.append(case.name)
            continue
        found = {metric: row for metric, row in measured.items() if row is not None}
        verdicts = {metric: case.is_met_by(metric, row.value, row.spread) for metric, row in found.items()}
        missed = [_WORDS[metric] for metric, is_met in verdicts.items() if is_met is False]
        is_judged = any(is_met is not None for is_met in verdicts.values())
        n_judged += is_judged
        n_met += is_judged and not missed
        verdict = f"missed: {'; '.join(missed)}" if missed else "met" if is_judged else ""
        cells = [case.name, _increase(found["increase"])]
        for metric in _SHOWN:
            cells += [_with_interval(found[metric]), _peer(case, metric)]
        lines.append(f"| {' | '.join([*cells, _wanted(case), verdict])} |")
    titles = ["recipe", "increase, %"]
    for title in _SHOWN.values():
        titles += [title, "best other"]
    head = [f"| {' | '.join([*titles, 'wanted', ''])} |", "|---" * (len(titles) + 2) + "|"]
    missing = [f"Not measured: {', '.join(unmeasured)}.", ""] if unmeasured else []
    return [
        f"# Quality of {table.model}, compressed",
        "",
        f"**{n_met} of {n_judged} cases as wanted.** ± is half the 95% interval over windows, paired with "
        f"the parent's. Others: {table.about}. Where no figure is wanted outright, none shall be worse than "
        "the best other's beyond its own interval. Reproduce: `benchmarks/quality_rows.py`.",
        "",
        *([*head, *lines, ""] if lines else []),
        *missing,
    ]


def _increase(row: Result) -> str:
    return f"{row.value:+.2f} ± {row.spread / 2:.2f}"


def _with_interval(row: Result) -> str:
    return (
        f"{row.value:.4g} ± {row.spread / 2:.1g}"
        if row.unit == "nats"
        else f"{row.value:.2f} ± {row.spread / 2:.2f}"
    )


def _peer(case: Case, metric: Metric) -> str:
    best = case.best(metric)
    return "" if best is None else f"{best[1]:g} {best[0]}"


def _wanted(case: Case) -> str:
    if case.bars:
        return "; ".join(
            f"{_WORDS[metric]} {'at least' if metric == 'top1' else 'at most'} {bar:g}"
            for metric, bar in case.bars.items()
        )
    return "no worse" if case.peers else ""
