"""A plan as rows for a terminal, and as plain data for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sailfish.base.units import format_bytes
from sailfish.plan.types import Plan

_BYTE_DECISIONS = ("memory_bytes", "kv_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table."""

    name: str
    value: str
    why: str


def memory_rows(plan: Plan) -> list[Row]:
    """Return one row for each part of the memory, and their sum."""
    rows = [Row(name=line.name, value=format_bytes(line.bytes), why=line.why) for line in plan.memory]
    return [*rows, Row(name="total", value=format_bytes(plan.total_bytes), why=f"on {plan.target}")]


def decision_rows(plan: Plan) -> list[Row]:
    """Return one row for each setting, with what was asked where it was."""
    return [
        Row(name=decision.name, value=_shown(decision.name, decision.active), why=decision.why)
        for decision in plan.decisions
    ]


def as_data(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON-able data, sums included."""
    return {**asdict(plan), "total_bytes": plan.total_bytes, "blocks_per_sequence": plan.blocks_per_sequence}


def _shown(name: str, active: str) -> str:
    return format_bytes(int(active)) if name in _BYTE_DECISIONS else active
