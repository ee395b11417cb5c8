"""Draws small multiples as SVG text: lines on logarithmic axes, and bars beside a reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_INK, _FAINT, _GRID = "#1f2937", "#6b7280", "#e5e7eb"
_COLOURS = {
    "Sailfish": "#0f766e",
    "Marlin": "#c2410c",
    "Machete": "#7c3aed",
    "cuBLAS bf16": "#6b7280",
    "ideal": "#9ca3af",
}
_FONT = "font-family='ui-sans-serif, system-ui, Helvetica, Arial, sans-serif'"
_PANEL_W, _PANEL_H, _GAP = 330, 220, 46
_LEFT, _TOP = 48, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """One panel of lines: points (x, y) by the name of each series."""

    title: str
    series: Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """One panel of bars: (label, value)."""

    title: str
    values: Sequence[tuple[str, float]]


def lines(title: str, panels: Sequence[Lines], columns: int = 2) -> str:
    """Return a picture of panels that share their axes."""
    xs = [x for panel in panels for points in panel.series.values() for x, _ in points]
    ys = [y for panel in panels for points in panel.series.values() for _, y in points]
    x_low, x_high = math.log(min(xs)), math.log(max(xs))
    y_low, y_high = math.log(min(ys) * 0.8), math.log(max(ys) * 1.2)
    names = list(panels[0].series)
    rows = -(-len(panels) // columns)
    height = _TOP + rows * (_PANEL_H + _GAP) + 6
    body = [_text(_LEFT, 24, title, size=15, weight=600), *_legend(names)]
    for i, panel in enumerate(panels):
        left = _LEFT + (i % columns) * (_PANEL_W + _GAP)
        top = _TOP + (i // columns) * (_PANEL_H + _GAP) + 16

        def at(x: float, y: float, left: float = left, top: float = top) -> tuple[float, float]:
            across = (math.log(x) - x_low) / (x_high - x_low)
            up = (math.log(y) - y_low) / (y_high - y_low)
            return left + across * _PANEL_W, top + (1 - up) * (_PANEL_H - 20)

        body.append(_text(left, top - 8, panel.title, size=12, weight=600))
        for tick in _powers(math.exp(y_low), math.exp(y_high), 10):
            x, y = at(math.exp(x_low), tick)
            body.append(
                f"<line x1='{x:.1f}' y1='{y:.1f}' x2='{x + _PANEL_W:.1f}' y2='{y:.1f}' stroke='{_GRID}'/>"
            )
            body.append(_text(x - 6, y + 4, f"{tick:g}", size=10, colour=_FAINT, anchor="end"))
        for tick in _powers(math.exp(x_low), math.exp(x_high), 4):
            x, _ = at(tick, 1.0)
            body.append(_text(x, top + _PANEL_H - 4, f"{tick:g}", size=10, colour=_FAINT, anchor="middle"))
        for name, points in panel.series.items():
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
            width = 2.6 if name == "Sailfish" else 1.4
            dash = " stroke-dasharray='4 3'" if name == "ideal" else ""
            body.append(
                f"<polyline points='{path}' fill='none' stroke='{_COLOURS[name]}' "
                f"stroke-width='{width}'{dash}/>"
            )
    return _picture(_LEFT + columns * (_PANEL_W + _GAP), height, body)


def bars(title: str, panels: Sequence[Bars], *, reference: float) -> str:
    """Return a picture of a group of bars for each panel, all on one axis from zero, with a reference."""
    most = max(value for panel in panels for _, value in panel.values) * 1.12
    width, name_w, bar_h = 760, 150, 20
    scale = (width - name_w - 70) / most
    y = 50.0
    body = [_text(16, 26, title, size=15, weight=600)]
    for panel in panels:
        body.append(_text(16, y + 14, panel.title, size=12, weight=600))
        y += 22
        for label, value in panel.values:
            colour = _COLOURS["Sailfish"] if value >= reference else _COLOURS["Marlin"]
            body.append(_text(name_w - 8, y + 14, label, size=11, colour=_FAINT, anchor="end"))
            body.append(
                f"<rect x='{name_w}' y='{y:.1f}' width='{value * scale:.1f}' height='{bar_h - 5}' "
                f"fill='{colour}'/>"
            )
            body.append(_text(name_w + value * scale + 6, y + 13, f"{value:.2f}", size=11))
            y += bar_h
        y += 10
    x = name_w + reference * scale
    body.append(
        f"<line x1='{x:.1f}' y1='44' x2='{x:.1f}' y2='{y - 8:.1f}' stroke='{_INK}' stroke-dasharray='3 3'/>"
    )
    return _picture(width, y + 6, body)


def _legend(names: Sequence[str]) -> list[str]:
    found, x = [], float(_LEFT)
    for name in names:
        dash = " stroke-dasharray='4 3'" if name == "ideal" else ""
        found.append(
            f"<line x1='{x:.0f}' y1='44' x2='{x + 20:.0f}' y2='44' stroke='{_COLOURS[name]}' "
            f"stroke-width='2.4'{dash}/>"
        )
        found.append(_text(x + 26, 48, name, size=11, colour=_FAINT))
        x += 44 + 6.4 * len(name)
    return found


def _powers(low: float, high: float, base: float) -> list[float]:
    first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
    return [base**k for k in range(first, last + 1)]


def _text(
    x: float, y: float, text: str, *, size: int, weight: int = 400, colour: str = _INK, anchor: str = "start"
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' font-weight='{weight}' fill='{colour}' "
        f"text-anchor='{anchor}' {_FONT}>{escape(text)}</text>"
    )


def _picture(width: float, height: float, body: Sequence[str]) -> str:
    frame = f"<rect width='{width:.0f}' height='{height:.0f}' fill='white'/>"
    size = f"width='{width:.0f}' height='{height:.0f}' viewBox='0 0 {width:.0f} {height:.0f}'"
    return "\n".join([f"<svg xmlns='http://www.w3.org/2000/svg' {size}>", frame, *body, "</svg>"]) + "\n"
