"""Draws reports as one HTML page that needs nothing else: its plots are SVG. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from sailfish.base.units import format_bytes, format_duration
from sailfish.compress.recipe import as_yaml
from sailfish.compress.report import LinearFacts, Report, speed_words

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#5b6675;--line:#d9dee5;--fill:#f5f7f9;--a:#1f77b4;
--b:#d1603d;--c:#2a9d6f;--d:#8a63c9}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9aa5b4;--line:#333b46;--fill:#1b2028}
body{background:#12161c}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);max-width:64rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin:0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
p.lead{color:var(--soft);margin:.2rem 0 1rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}th,td{padding:.25rem .6rem;text-align:right;
border-bottom:1px solid var(--line)}th{color:var(--soft);font-weight:600}
th:first-child,td:first-child{text-align:left}.cards{display:flex;flex-wrap:wrap;gap:.8rem;margin:1rem 0}
.card{background:var(--fill);border:1px solid var(--line);border-radius:.5rem;
padding:.6rem .9rem;min-width:9rem}
.card b{display:block;font-size:1.25rem}.card span{color:var(--soft);font-size:.85rem}
svg{width:100%;height:auto;background:var(--fill);border:1px solid var(--line);border-radius:.5rem}
svg text{fill:var(--soft);font:12px system-ui,sans-serif}.wide{overflow-x:auto}.wide td{white-space:nowrap}
pre{background:var(--fill);border:1px solid var(--line);border-radius:.5rem;padding:.7rem;overflow-x:auto;
font-size:.85rem}.warn{border-left:4px solid var(--b);padding:.1rem .8rem;margin:.5rem 0}
"""
_COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 760, 240, 64, 34, 26
Points = Sequence[tuple[float, float]]


def page(reports: Sequence[Report]) -> str:
    """Return the page of one report, or of several of one parent: side by side, then each in full."""
    parts = [_heading(reports)]
    if len(reports) > 1:
        parts.append(_comparison(reports))
    for report in reports:
        parts.append(_one(report, alone=len(reports) == 1))
    title = f"{reports[0].parent}, compressed"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


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


def _comparison(reports: Sequence[Report]) -> str:
    rows = [
        (
            _name(report),
            format_bytes(report.bytes_after),
            f"{report.linear_bits:.2f}",
            f"{report.quality.perplexity.value:.3f}",
            f"{report.quality.increase.value:+.2%}",
            f"{report.quality.kl.value:.4f}",
            f"{report.quality.top1.value:.1%}",
            speed_words(report),
            format_duration(sum(report.seconds.values())),
        )
        for report in reports
    ]
    first = reports[0]
    parent = (
        "parent",
        format_bytes(first.bytes_before),
        f"{8 * sum(f.dense_bytes for f in first.linears) / max(1, _n_weights(first)):.2f}",
        f"{first.quality.parent_perplexity.value:.3f}",
    )
    heads = ("recipe", "size", "bits", "perplexity", "change", "KL", "same top token", "speed", "time")
    points = [(_name(r), [(r.bytes_after / (1 << 20), r.quality.kl.value)]) for r in reports]
    return (
        "<h2>Side by side</h2>"
        + f'<div class="wide">{_table(heads, [(*parent, "", "0", "100%", "1.00 x", ""), *rows])}</div>'
        + _plot("Divergence from the parent over size", "size, MiB", "KL, nats", points, joined=False)
    )


def _one(report: Report, *, alone: bool) -> str:
    quality = report.quality
    cards = (
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
    boxes = "".join(f'<div class="card"><span>{escape(k)}</span><b>{escape(v)}</b></div>' for k, v in cards)
    notes = [f"{f.what}: {f.where}: {f.why}" for f in report.fallbacks]
    warnings = "".join(f'<p class="warn">{escape(text)}</p>' for text in [*notes, *report.warnings])
    heading = "" if alone else f"<h2>{escape(_name(report))}</h2>"
    return (
        f"{heading}<p class='lead'>{escape(str(report.recipe.get('about', '')))}</p>"
        f'<div class="cards">{boxes}</div>{warnings}'
        + _errors(report)
        + _drifts(report)
        + _speeds(report)
        + _sensitivity(report)
        + _linears(report)
        + _provenance(report)
    )


def _errors(report: Report) -> str:
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for facts in report.linears:
        kind = facts.module.rpartition(".")[2]
        error = facts.weight_error if facts.output_error is None else facts.output_error
        by_kind.setdefault(kind, []).append((_layer(facts), error))
    what = "outputs" if any(f.output_error is not None for f in report.linears) else "weights"
    return f"<h2>Error of each linear's {what}</h2>" + _plot(
        "Relative error", "block", "error", list(by_kind.items()), joined=True
    )


def _drifts(report: Report) -> str:
    points = [(float(i), drift) for i, drift in enumerate(report.block_drift)]
    return "<h2>How far the states are from the parent's after each block</h2>" + _plot(
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
    return "<h2>Speed of each linear here</h2>" + _table(heads, rows)


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
        f'<div class="wide">{_table(("matrix", *formats), rows)}</div></details>'
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
        f'<div class="wide">{_table(heads, rows)}</div></details>'
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
    table = _table(("what", "value"), rows)
    return f"<h2>Where it is from</h2>{table}<h2>Recipe</h2><pre>{escape(recipe)}</pre>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _plot(title: str, x_name: str, y_name: str, series: Sequence[tuple[str, Points]], *, joined: bool) -> str:
    """Return a plot from 0 upwards; each series is a line with dots, or dots alone with their names."""
    xs = [x for _, points in series for x, _ in points] or [0.0]
    ys = [y for _, points in series for _, y in points] or [0.0]
    low, high = (min(xs), max(xs)) if joined else (0.0, max(xs) * 1.15)
    x_at = _scale(low, high if high > low else low + 1, _LEFT, _WIDTH - 16)
    top = max(ys) * 1.12 or 1.0
    y_at = _scale(0.0, top, _HEIGHT - _BOTTOM, _TOP)
    drawn = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for value in _ticks(top):
        drawn.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - 16}" y1="{y_at(value):.1f}" y2="{y_at(value):.1f}" '
            f'style="stroke:var(--line)"/><text x="{_LEFT - 6}" y="{y_at(value) + 4:.1f}" '
            f'text-anchor="end">{value:.3g}</text>'
        )
    every = -(-len(set(xs)) // 12)  # as many blocks as there is room for
    for x in sorted(set(xs))[::every] if joined else _ticks(high or 1.0):
        drawn.append(f'<text x="{x_at(x):.1f}" y="{_HEIGHT - 18}" text-anchor="middle">{x:g}</text>')
    for number, (name, points) in enumerate(series):
        colour = _COLOURS[number % len(_COLOURS)]
        dash = ";stroke-dasharray:5 4" if number >= len(_COLOURS) else ""
        places = [(x_at(x), y_at(y)) for x, y in points]
        if joined:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            drawn.append(
                f'<polyline points="{path}" style="fill:none;stroke:{colour};stroke-width:2{dash}"/>'
            )
            drawn.append(
                f'<text x="{_LEFT + 24 + 94 * number}" y="14" style="fill:{colour}">{escape(name)}</text>'
            )
        for x, y in places:
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" style="fill:{colour}"/>')
            if not joined:
                side, anchor = (8, "start") if x < _WIDTH / 2 else (-8, "end")
                drawn.append(
                    f'<text x="{x + side:.1f}" y="{y - 6:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
                )
    drawn.append(f'<text x="{_WIDTH - 16}" y="{_HEIGHT - 3}" text-anchor="end">{escape(x_name)}</text>')
    drawn.append(f'<text x="4" y="14">{escape(y_name)}</text></svg>')
    return "".join(drawn)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(top: float) -> list[float]:
    """Return round numbers from 0 up to `top`, six at most."""
    unit = 10.0 ** math.floor(math.log10(top / 5))
    step = next(unit * by for by in (1, 2, 5, 10) if unit * by * 5 >= top * 0.999)
    return [step * n for n in range(6) if step * n <= top]


def _layer(facts: LinearFacts) -> float:
    return float(next((part for part in facts.module.split(".") if part.isdigit()), "0"))


def _n_weights(report: Report) -> int:
    return sum(facts.n_out * facts.n_in for facts in report.linears)


def _name(report: Report) -> str:
    return str(report.recipe.get("name", "recipe"))


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
