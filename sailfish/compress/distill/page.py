"""Draws a distillation's report as one HTML page."""

from __future__ import annotations

from html import escape

import msgspec

from sailfish.base.units import format_duration
from sailfish.compress.distill.report import Report
from sailfish.compress.drawing import cards, document, plot, table, warnings
from sailfish.compress.report import Estimate

_DIVERGENCES = {"kl": "KL to the teacher, nats", "tvd": "total variation distance to the teacher"}
_ROWS = (
    ("perplexity", "perplexity", ".3f", "+.2%"),
    ("KL to the teacher, nats", "kl", ".4f", "+.4f"),
    ("same top token", "top1", ".2%", "+.2%"),
    ("expected acceptance", "acceptance", ".4f", "+.4f"),
)
"""Name, field, how a figure is written, how a gain is."""


def page(report: Report) -> str:
    """Return the page of a report."""
    body = (
        f"<h1>{escape(report.student)}, taught by {escape(report.teacher)}</h1>"
        f'<p class="lead">Sailfish {escape(report.sailfish)}, torch {escape(report.torch)}, on '
        f"{escape(report.device)}, processes: {report.n_processes}. Measured over {report.n_held_windows} "
        f"windows of {report.schedule.length} tokens of {escape(report.held_out)}, activations in "
        f"{report.dtype}. Intervals are 95% over windows, those of changes paired.</p>"
        + cards(_figures(report))
        + warnings(report.warnings)
        + "<h2>Before and after</h2>"
        + table(("figure", "before", "after", "change"), table_rows(report))
        + _curves(report)
        + "<h2>How it was trained</h2>"
        + table(("what", "value"), _facts(report))
    )
    return document(f"{report.student}, distilled", body)


def table_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """Return (figure, before, after, change), each with its interval."""
    return [
        (
            name,
            _words(getattr(report.before, field), form),
            _words(getattr(report.after, field), form),
            _words(getattr(report.gain, field), gain_form),
        )
        for name, field, form, gain_form in _ROWS
    ]


def _figures(report: Report) -> list[tuple[str, str]]:
    before, after = report.before, report.after
    return [
        ("expected acceptance", f"{before.acceptance.value:.3f} → {after.acceptance.value:.3f}"),
        ("its change", f"{after.acceptance.value / before.acceptance.value - 1:+.2%}"),
        ("perplexity", f"{before.perplexity.value:.2f} → {after.perplexity.value:.2f}"),
        ("KL to the teacher", f"{before.kl.value:.3f} → {after.kl.value:.3f}"),
        ("teacher's perplexity", f"{report.teacher_perplexity.value:.2f}"),
        ("time", format_duration(report.seconds)),
    ]


def _curves(report: Report) -> str:
    divergence = [(float(point.step), point.divergence) for point in report.curve]
    cross = [(float(point.step), point.cross_entropy) for point in report.curve]
    rates = [(float(point.step), point.lr) for point in report.curve]
    return "<h2>Training</h2>" + "".join(
        plot(name, "step", unit, [(name, points)], joined=True)
        for name, unit, points in (
            (_DIVERGENCES[report.schedule.divergence], "", divergence),
            ("cross-entropy", "nats", cross),
            ("rate", "lr", rates),
        )
    )


def _facts(report: Report) -> list[tuple[str, str]]:
    schedule = [(key, str(value)) for key, value in msgspec.to_builtins(report.schedule).items()]
    return [
        ("text", report.text),
        ("windows", f"{report.n_windows:,}, {report.n_sampled:,} of them written by the teacher"),
        ("matrices that kept their zeros", str(report.n_held_zeros)),
        *schedule,
    ]


def _words(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"
