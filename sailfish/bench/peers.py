"""What other engines reach on the same rows, and the targets set against them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Literal

import msgspec


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of others for one row of ours, and what we want of it."""

    row: str
    unit: str
    better: Literal["lower", "higher"]
    peers: dict[str, float]
    """Figure by who reached it; empty where the row is a ratio."""
    target: float | None = None
    stretch: float | None = None
    scales_with: str | None = None
    """The figure of the machine's calibration that rules the row; None: no single one does."""

    def best(self) -> tuple[str, float] | None:
        """Return the name and figure of the best peer, or None without one."""
        pick = min if self.better == "lower" else max
        return pick(self.peers.items(), key=lambda item: item[1], default=None)

    def scale(self, calibration: Mapping[str, float]) -> float:
        """Return what figures of the peers' machine are to be multiplied by to compare with this one's."""
        name = self.scales_with or ""
        here, there = calibration.get(name), _table().calibration.get(name)
        if here is None or there is None:
            return 1.0
        return there / here if self.better == "lower" else here / there

    def is_met_by(self, value: float, calibration: Mapping[str, float]) -> bool | None:
        """Say whether a figure meets the target, scaled to this machine; None without a target."""
        if self.target is None:
            return None
        target = self.target * self.scale(calibration)
        return value <= target if self.better == "lower" else value >= target


class _Table(msgspec.Struct, frozen=True, kw_only=True):
    about: str
    source: str
    date: str
    device: str
    calibration: dict[str, float]
    rows: list[Peer]


def peer(row: str) -> Peer | None:
    """Return what is known of a row by its name, or None."""
    return _by_row().get(row)


def names() -> list[str]:
    """Return the names of all rows, in the order in which they are shown."""
    return list(_by_row())


def calibration() -> Mapping[str, float]:
    """Return what the machine that the peers ran on gave by itself."""
    return _table().calibration


def source() -> str:
    """Return where and when the figures were measured, in words."""
    table = _table()
    return f"{table.source}, {table.date}"


@cache
def _table() -> _Table:
    text = files("sailfish.bench").joinpath("peers.json").read_bytes()
    return msgspec.json.decode(text, type=_Table)


@cache
def _by_row() -> dict[str, Peer]:
    return {row.row: row for row in _table().rows}
