"""Units as people write them, there and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sailfish.base import units
from sailfish.base.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("24GiB", 24 * 2**30),
        ("24G", 24 * 2**30),
        ("512MB", 512_000_000),
        ("1.5 GiB", 3 * 2**29),
        ("4096", 4096),
        (" 8 kib ", 8192),
        ("0", 0),
    ],
)
def test_sizes_know_binary_and_decimal_units(text: str, n_bytes: int) -> None:
    assert units.parse_bytes(text) == n_bytes


def test_a_count_in_k_is_binary_because_contexts_are() -> None:
    assert (units.parse_count("32k"), units.parse_count("32K"), units.parse_count("1m")) == (
        32768,
        32768,
        2**20,
    )


@pytest.mark.parametrize(
    ("text", "seconds"), [("200ms", 0.2), ("30", 30.0), ("1.5s", 1.5), ("5m", 300.0), ("2h", 7200.0)]
)
def test_durations_are_seconds(text: str, seconds: float) -> None:
    assert units.parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "1 2", "nan", "٣", "12parsecs", "9" * 100, "0x10"])
@pytest.mark.parametrize("parse", [units.parse_bytes, units.parse_count, units.parse_duration_s])
def test_what_is_no_size_is_refused_in_one_line_that_shows_the_form(parse: object, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)  # type: ignore[operator]
    assert "such as" in str(caught.value) and "\n" not in str(caught.value)


def test_a_size_beyond_64_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match="too large"):
        units.parse_bytes("9" * 30)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (16 * 10**9, "14.9 GiB"),
        (2**40, "1.00 TiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_sizes_are_shown_with_three_figures(n_bytes: int, text: str) -> None:
    assert units.format_bytes(n_bytes) == text


@given(st.integers(0, 2**50))
def test_a_shown_size_reads_back_within_its_three_figures(n_bytes: int) -> None:
    shown = units.format_bytes(n_bytes)
    assert units.parse_bytes(shown) == pytest.approx(n_bytes, rel=0.006, abs=1)


@given(st.integers(0, 2**40))
def test_a_shown_count_reads_back_exactly(count: int) -> None:
    assert units.parse_count(units.format_count(count)) == count


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0000351, "35 us"), (0.0352, "35.2 ms"), (1.5, "1.50 s"), (300.0, "5.0 min")]
)
def test_durations_are_shown_in_the_unit_that_reads_best(seconds: float, text: str) -> None:
    assert units.format_duration(seconds) == text
