"""The tiles chosen for 8-bit products are those that were measured best, or near it, on an H200."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sailfish.kernels.cuda import linear8, program

MEASURED = {
    (16, 6144, 4096): {"32x64/2": 9.6, "32x64/1": 9.8, "64x128/1": 10.9},
    (16, 4096, 4096): {"32x64/2": 7.2, "32x64/1": 7.4, "64x128/2": 8.1, "64x128/1": 8.3},
    (16, 28672, 4096): {"32x64/1": 34.8, "64x128/1": 35.9, "64x256/1": 36.8},
    (16, 4096, 14336): {"32x64/2": 18.4, "32x64/1": 21.1, "64x128/2": 21.4},
    (64, 4096, 14336): {"64x128/2": 20.7, "32x64/1": 22.1, "32x64/2": 23.5, "64x128/1": 24.0},
    (64, 6144, 4096): {"64x128/2": 10.0, "64x128/1": 10.5, "64x256/2": 12.7},
    (128, 4096, 4096): {"64x128/1": 8.8, "64x128/2": 9.0, "128x128/2": 9.9, "128x128/1": 12.6},
    (128, 28672, 4096): {"128x256/1": 37.5, "128x128/1": 38.4, "64x128/1": 39.7, "64x256/1": 40.4},
    (256, 6144, 4096): {"128x128/1": 14.1, "64x128/1": 15.6, "64x256/1": 16.1, "256x128/1": 23.2},
    (256, 4096, 14336): {"128x128/2": 27.5, "64x128/1": 27.6, "64x256/2": 35.0, "128x128/1": 38.1},
    (512, 28672, 4096): {"128x128/1": 90.4, "256x128/1": 96.9, "128x256/1": 98.2},
    (2048, 28672, 4096): {"256x128/1": 333.2, "128x256/1": 339.6},
}
"""Microseconds of float8 by (tokens, outputs, inputs) and tile: tokens x rows / blocks that share it."""


@pytest.fixture(autouse=True)
def h200(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(program, "n_processors", lambda: 132)
    linear8.choose.cache_clear()
    yield
    linear8.choose.cache_clear()


@pytest.mark.parametrize("size", MEASURED, ids=str)
def test_the_chosen_tile_is_within_a_tenth_of_the_best(size: tuple[int, int, int]) -> None:
    shape, splits = linear8.choose(*size)
    measured = MEASURED[size]
    assert measured[f"{shape.tokens}x{shape.rows}/{splits}"] <= 1.1 * min(measured.values())


def test_blocks_share_a_tile_only_where_all_run_at_once() -> None:
    for n_tokens in range(1, 3000, 37):
        for n_out, n_in in ((6144, 4096), (4096, 14336), (28672, 4096), (128, 128)):
            shape, splits = linear8.choose(n_tokens, n_out, n_in)
            n_tiles = -(-n_tokens // shape.tokens) * -(-n_out // shape.rows)
            assert splits == 1 or (shape.can_split and n_tiles * splits <= 132 * shape.per_sm and n_in > 128)
