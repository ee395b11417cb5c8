"""The wide 4-bit product's tile shapes cover every result, fit their card and waste no wave."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sailfish.kernels.cuda import wide
from sailfish.kernels.cuda.nvrtc import compile_source, has_nvrtc
from sailfish.kernels.cuda.wide import SHAPES, Shape
from sailfish.kernels.int4 import STRIP, UNIT

N_PROCESSORS = 132


@given(
    shape=st.sampled_from(SHAPES),
    n_out=st.integers(1, 40_000),
    token_tiles=st.integers(1, 70),
    n_at_once=st.integers(1, 300),
)
def test_row_tiles_cover_all_rows_in_no_more_waves(
    shape: Shape, n_out: int, token_tiles: int, n_at_once: int
) -> None:
    """Narrow tiles end the last wave sooner; they may not begin another."""
    whole, narrow, groups = wide.cut_rows(shape, n_out, token_tiles, n_at_once)
    assert 1 <= groups <= shape.groups
    covered = whole * shape.rows + narrow * groups * 64
    assert n_out <= covered < n_out + shape.rows
    n_plain = token_tiles * math.ceil(n_out / shape.rows)
    assert math.ceil(token_tiles * (whole + narrow) / n_at_once) == math.ceil(n_plain / n_at_once)


@given(n_tokens=st.integers(1, 9000), n_out=st.integers(1, 40_000), n_in=st.integers(1, 30_000))
def test_a_choice_can_be_launched(n_tokens: int, n_out: int, n_in: int) -> None:
    shape, splits = wide.choose(n_tokens, n_out, n_in, N_PROCESSORS)
    assert shape in SHAPES
    assert splits <= 8  # what a portable cluster holds
    assert splits <= math.ceil(n_in / (2 * UNIT))
    assert math.isfinite(wide.predict_us(n_tokens, n_out, n_in, N_PROCESSORS, shape, splits))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_block_fits_its_share_of_a_multiprocessor(shape: Shape) -> None:
    """Of 228 KB of shared memory each block has 1 for the system; a split tile's sums lie in the ring."""
    ring = shape.slots * (shape.tokens * UNIT * 2 + shape.rows // STRIP * (512 + 2 * 64))
    staged = shape.groups * shape.chunk * 256
    assert shape.per_sm * (ring + staged + 1024 + 16 * shape.slots + 1024) <= 228 << 10
    assert shape.slots >= 3
    assert shape.rows * shape.tokens * 4 <= ring
    assert shape.threads * shape.per_sm <= 2048


def test_an_older_card_has_the_shared_memory() -> None:
    """99 KB is what a block of sm_86 and sm_89 may have."""
    rows, slots = wide._MMA_ROWS, wide._MMA_SLOTS
    for tokens in wide._MMA_TOKENS:
        assert slots * (tokens * UNIT * 2 + rows // STRIP * (512 + 2 * 64)) <= 99 << 10


def test_larger_products_are_predicted_to_take_longer() -> None:
    def least_us(n_tokens: int, n_out: int = 4096, n_in: int = 4096) -> float:
        way = wide.choose(n_tokens, n_out, n_in, N_PROCESSORS)
        return wide.predict_us(n_tokens, n_out, n_in, N_PROCESSORS, *way)

    assert least_us(64) < least_us(256) < least_us(1024) < least_us(4096)
    assert least_us(256) < least_us(256, n_out=14336) < least_us(256, n_out=14336, n_in=8192)


@pytest.mark.skipif(not has_nvrtc(), reason="NVRTC is not installed")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_product_waits_for_the_one_before(shape: Shape) -> None:
    """The assembler makes wgmma synchronous, and only says so, where registers are short or misused."""
    compiled = compile_source("wide.cu", "sm_90a", dict(shape.defines(2, True, torch.bfloat16)))
    assert "serialized" not in compiled.log
