"""Draws pages of HTML that need nothing else: tables, cards, and plots in SVG. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

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
_MOST_DOTS = 40
Points = Sequence[tuple[float, float]]


def document(title: str, body: str) -> str:
    """Return a whole page; the title is text, the body HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def cards(pairs: Sequence[tuple[str, str]]) -> str:
    """Return a box for each (what, figure)."""
    boxes = "".join(f'<div class="card"><span>{escape(k)}</span><b>{escape(v)}</b></div>' for k, v in pairs)
    return f'<div class="cards">{boxes}</div>'


def warnings(texts: Sequence[str]) -> str:
    """Return a marked line for each text."""
    return "".join(f'<p class="warn">{escape(text)}</p>' for text in texts)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under heads; the first column is of names."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def plot(title: str, x_name: str, y_name: str, series: Sequence[tuple[str, Points]], *, joined: bool) -> str:
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
        # Of a long curve the dots would hide the line.
        for x, y in places if not joined or len(places) <= _MOST_DOTS else ():
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
