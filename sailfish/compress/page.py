"""Draws reports as one HTML page. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sailfish.base.units import format_bytes, format_duration
from sailfish.compress.drawing import cards, document, plot, table, warnings
from sailfish.compress.recipe import as_yaml
from sailfish.compress.report import LinearFacts, Report, speed_words


def page(reports: Sequence[Report]) -> str:
    """Return the page of one report, or of several of one parent: side by side, then each in full."""
    parts = [_heading(reports)]
    if len(reports) > 1:
        parts.append(_comparison(reports))
    for report in reports:
        parts.append(_one(report, alone=len(reports) == 1))
    title = f"{reports[0].parent}, compressed"
    return document(title, "".join(parts))


def _heading(reports: Sequence[Report]) -> str:
    first = reports[0]
    names = ", ".join(_name(report) for report in reports)
    return (
        f"<h1>{escape(first.parent)}: {escape(names)}</h1>"
        f'<p class="lead">Sailfish {escape(first.sailfish)}, torch {escape(first.torch)}, on '
        f"{escape(first.device)}. Measured over {first.quality.n_windows} windows of "
        f"{first.quality.window_tokens} tokens ({first.quality.n_tokens:,} scored) of "
        f"{escape(first.quality.text)}, activations in {first.quality.dtype}. "
        "Intervals are 95% over windows.</p>"
    )


def side_by_side(reports: Sequence[Report]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the heads and rows of a table of reports of one parent: the parent first."""
    first = reports[0]
    parent = (
        "parent",
        format_bytes(first.bytes_before),
        f"{8 * sum(f.dense_bytes for f in first.linears) / max(1, _n_weights(first)):.3f}",
        f"{first.quality.parent_perplexity.value:.3f}",
        *("", "0", "100%", "1.00 x", ""),
    )
    rows = [
        (
            _name(report),
            format_bytes(report.bytes_after),
            f"{report.linear_bits:.3f}",
            f"{report.quality.perplexity.value:.3f}",
            f"{report.quality.increase.value:+.2%}",
            f"{report.quality.kl.value:.4f}",
            f"{report.quality.top1.value:.2%}",
            speed_words(report),
            format_duration(sum(report.seconds.values())),
        )
        for report in reports
    ]
    heads = ("recipe", "size", "bits", "perplexity", "change", "KL", "same top", "speed", "time")
    return heads, [parent, *rows]


def _comparison(reports: Sequence[Report]) -> str:
    points = [(_name(r), [(r.bytes_after / (1 << 20), r.quality.kl.value)]) for r in reports]
    return (
        "<h2>Side by side</h2>"
        + f'<div class="wide">{table(*side_by_side(reports))}</div>'
        + plot("Divergence from the parent over size", "size, MiB", "KL, nats", points, joined=False)
    )


def _one(report: Report, *, alone: bool) -> str:
    quality = report.quality
    figures = (
        ("size", f"{format_bytes(report.bytes_before)} → {format_bytes(report.bytes_after)}"),
        ("bits a weight of the blocks", f"{report.linear_bits:.3f}"),
        ("perplexity", f"{quality.parent_perplexity.value:.3f} → {quality.perplexity.value:.3f}"),
        (
            "its change",
            f"{quality.increase.value:+.2%} [{quality.increase.low:+.2%}, {quality.increase.high:+.2%}]",
        ),
        ("KL to the parent", f"{quality.kl.value:.4f} [{quality.kl.low:.4f}, {quality.kl.high:.4f}]"),
        ("KL p99, p99.9", f"{quality.kl_p99.value:.3f}, {quality.kl_p999.value:.3f}"),
        ("same top token", f"{quality.top1.value:.2%} [{quality.top1.low:.2%}, {quality.top1.high:.2%}]"),
        ("time", format_duration(sum(report.seconds.values()))),
        ("peak memory", format_bytes(report.peak_bytes)),
    )
    notes = [f"{f.what}: {f.where}: {f.why}" for f in report.fallbacks]
    heading = "" if alone else f"<h2>{escape(_name(report))}</h2>"
    return (
        f"{heading}<p class='lead'>{escape(str(report.recipe.get('about', '')))}</p>"
        f"{cards(figures)}{warnings([*notes, *report.warnings])}"
        + _removed(report)
        + _errors(report)
        + _drifts(report)
        + _speeds(report)
        + _sensitivity(report)
        + _linears(report)
        + _provenance(report)
    )


def _removed(report: Report) -> str:
    if not report.removed:
        return ""
    rows = [
        (
            part.where,
            part.what,
            f"{part.influence:.4f}",
            "" if part.repaired is None else f"{part.repaired:.4f}",
        )
        for part in report.removed
    ]
    influence = [(float(layer), value) for layer, value in enumerate(report.block_influence)]
    drawn = (
        plot("Influence", "block", "1 - cosine", [("states", influence)], joined=True) if influence else ""
    )
    heads = ("from", "removed", "influence or error of outputs", "repaired")
    return f"<h2>What was removed</h2>{drawn}{table(heads, rows)}"


def _errors(report: Report) -> str:
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for facts in report.linears:
        kind = facts.module.rpartition(".")[2]
        error = facts.weight_error if facts.output_error is None else facts.output_error
        by_kind.setdefault(kind, []).append((_layer(facts), error))
    what = "outputs" if any(f.output_error is not None for f in report.linears) else "weights"
    return f"<h2>Error of each linear's {what}</h2>" + plot(
        "Relative error", "block", "error", list(by_kind.items()), joined=True
    )


def _drifts(report: Report) -> str:
    points = [(float(i), drift) for i, drift in enumerate(report.block_drift)]
    return "<h2>How far the states are from the parent's after each block</h2>" + plot(
        "Relative distance", "block", "distance", [("states", points)], joined=True
    )


def _speeds(report: Report) -> str:
    if not any(speed.packed_us is not None for speed in report.speeds):
        return ""
    rows = [
        (
            f"{s.n_out} x {s.n_in}",
            str(s.n_linears),
            str(s.rows),
            _us(s.dense_us),
            _us(s.packed_us),
            "" if not s.packed_us or s.dense_us is None else f"{s.dense_us / s.packed_us:.2f} x",
            s.implementation,
        )
        for s in report.speeds
    ]
    heads = ("shape", "linears", "tokens", "dense, us", "packed, us", "faster", "by")
    return "<h2>Speed of each linear here</h2>" + table(heads, rows)


def _sensitivity(report: Report) -> str:
    if not report.sensitivity:
        return ""
    by_matrix: dict[str, list[str]] = {}
    for one in report.sensitivity:
        words = f"{one.kl:.5f}" + (" *" if one.is_chosen else "")
        by_matrix.setdefault(one.matrix.removesuffix(".weight"), []).append(words)
    formats = list(dict.fromkeys(f"{one.format} ({one.bits:.3g} bits)" for one in report.sensitivity))
    rows = [(matrix, *words) for matrix, words in by_matrix.items()]
    return (
        "<h2>What each matrix costs alone (KL; * is chosen)</h2><details><summary>"
        f"{len(rows)} matrices</summary>"
        f'<div class="wide">{table(("matrix", *formats), rows)}</div></details>'
    )


def _linears(report: Report) -> str:
    rows = [
        (
            facts.module,
            f"{facts.n_out} x {facts.n_in}",
            facts.how,
            "" if facts.alpha is None else f"{facts.alpha:.2f}",
            "" if facts.output_error is None else f"{facts.output_error:.2%}",
            f"{facts.weight_error:.2%}",
            f"{facts.zeros_frac:.1%}",
            format_bytes(facts.n_bytes),
            f"{facts.dense_bytes / max(1, facts.n_bytes):.2f} x",
        )
        for facts in report.linears
    ]
    heads = ("linear", "shape", "how", "alpha", "output error", "weight error", "zeros", "size", "smaller")
    return (
        f"<h2>Every linear</h2><details><summary>{len(rows)} linears</summary>"
        f'<div class="wide">{table(heads, rows)}</div></details>'
    )


def _provenance(report: Report) -> str:
    seconds = ", ".join(f"{name} {format_duration(value)}" for name, value in report.seconds.items())
    rows = [
        ("parent's digest", report.parent_digest),
        ("calibration", report.calibration),
        (
            "windows",
            f"{report.calibration_windows} of {report.calibration_tokens} tokens, seed {report.seed}",
        ),
        ("windows' digest", report.calibration_digest),
        ("time", seconds),
    ]
    recipe = as_yaml(report.recipe)
    return (
        f"<h2>Where it is from</h2>{table(('what', 'value'), rows)}<h2>Recipe</h2><pre>{escape(recipe)}</pre>"
    )


def _layer(facts: LinearFacts) -> float:
    return float(next((part for part in facts.module.split(".") if part.isdigit()), "0"))


def _n_weights(report: Report) -> int:
    return sum(facts.n_out * facts.n_in for facts in report.linears)


def _name(report: Report) -> str:
    return str(report.recipe.get("name", "recipe"))


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
