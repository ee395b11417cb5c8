"""The page about choices says what is chosen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sailfish.kernels.choose import choose_by_rows
from sailfish.kernels.contract import Case

PAGE = Path(__file__).parents[2] / "docs" / "choices.md"
FUSED = re.findall(
    r"^\| (\d+) x (\d+) \(.*?\) \| (\w+) \| (int4|int8|fp8) \| (.*) \|$",
    PAGE.read_text(encoding="utf-8"),
    re.M,
)
ROWS = re.findall(
    r"^\| (\d+) x (\d+) \(.*?\) \| (plain|int4|int8|fp8) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.M
)


def test_the_page_has_choices() -> None:
    assert {format for _, _, format, _ in ROWS} == {"plain", "int4", "int8", "fp8"}
    assert {format for *_, format, _ in FUSED} == {"int4", "fp8"}


@pytest.mark.parametrize(("n_out", "n_in", "format", "expected"), ROWS)
def test_a_row_of_the_page_is_what_is_chosen(n_out: str, n_in: str, format: str, expected: str) -> None:
    op = "linear" if format == "plain" else f"linear_{format}"
    case = Case(op=op, target="sm_90", dtype="bfloat16", n_out=int(n_out), n_in=int(n_in), group=128)
    assert _words(case) == expected


@pytest.mark.parametrize(("n_out", "n_in", "behind", "format", "expected"), FUSED)
def test_a_row_of_fused_products_is_what_is_chosen(
    n_out: str, n_in: str, behind: str, format: str, expected: str
) -> None:
    case = Case(
        op=f"norm_linear_{format}",
        target="sm_90",
        dtype="bfloat16",
        n_out=int(n_out),
        n_in=int(n_in),
        group=128,
        activation="" if behind == "nothing" else behind,
    )
    assert _words(case) == expected


def _words(case: Case) -> str:
    words = []
    for choice in choose_by_rows(case):
        rows = "more rows" if choice.max_rows is None else f"up to {choice.max_rows} rows"
        words.append(f"{rows}: {choice.implementation}")
    return ", ".join(words)
