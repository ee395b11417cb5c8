"""How streamed products are divided: on every card, for every format and layer, the pieces fit."""

from __future__ import annotations

import random

import pytest
import torch

from sailfish.base.errors import EngineError
from sailfish.kernels.contract import Case, StepBounds, Weight8
from sailfish.kernels.cuda.linear_limits import stream_bytes
from sailfish.kernels.cuda.stream import MOST_COLUMNS, rejects
from sailfish.kernels.cuda.stream_split import Card, Product, choose
from sailfish.kernels.int4 import pack

CARDS = {
    "RTX 3090": Card(processors=82, processor_shared_bytes=100 << 10, clusters=False),
    "A100": Card(processors=108, processor_shared_bytes=164 << 10, clusters=False),
    "H200": Card(processors=132, processor_shared_bytes=228 << 10, clusters=True),
}
LAYERS = [
    (4096, 6144),
    (4096, 4096),
    (4096, 28672),
    (14336, 4096),
    (11008, 4096),
    (4096, 128256),
    (512, 272),
    (64, 17),
    (28672, 8192),
]
"""Inputs and outputs."""


def make(form: str, n_in: int, n_out: int, n_tokens: int, group: int = 128) -> Product:
    """Return a product as the linears describe it."""
    row_bytes = n_in * (1 if form == "int8" else 2)
    is_int4 = form == "int4"
    quantum = max(1, group // 64) if is_int4 else 1
    return Product(
        file="",
        defines=(),
        dtype=torch.bfloat16,
        n_tokens=n_tokens,
        row_bytes=row_bytes,
        n_out=n_out,
        chunks=-(-row_bytes // (128 * quantum)) * quantum,
        plane_bytes=4 * 64 // group * 32 if is_int4 else 0,
        span=group if is_int4 else 0,
        quantum=quantum,
        is_8_bit=form == "int8",
    )


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("form", ["int4", "bf16", "int8"])
def test_a_division_fits_and_leaves_nothing_out(form: str, card: Card) -> None:
    for n_in, n_out in LAYERS:
        for n_tokens in (1, 2, 7, 8, 9, 16):
            product = make(form, n_in, n_out, n_tokens)
            split = choose(product, card)
            assert product.shared_bytes(split, card.clusters) <= card.shared_bytes
            assert split.warps in (4, 8, 16)
            assert split.columns * product.strips_per_block(split) >= product.strips
            assert split.splits * product.block_chunks(split) >= product.chunks
            assert split.splits * product.quantum <= -(-product.chunks // product.quantum) * product.quantum
            assert split.splits <= (8 if card.clusters else 64), "clusters of more than 8 are not portable"
            assert split.columns <= MOST_COLUMNS, "more than there are counters"
            assert not card.clusters or split.splits * split.columns <= 8 * card.processors


@pytest.mark.parametrize("form", ["int4", "bf16", "int8"])
def test_no_number_of_tokens_needs_a_kernel_that_captured_steps_do_not(form: str) -> None:
    for n_in, n_out in LAYERS[:6]:
        captured = {n: choose(make(form, n_in, n_out, n), CARDS["H200"]) for n in (1, 2, 4, 8, 16)}
        for n_tokens in range(1, 17):
            product = make(form, n_in, n_out, n_tokens)
            split = choose(product.in_bucket, CARDS["H200"])
            assert split in captured.values() and product.in_bucket.tiles == product.tiles
            assert product.shared_bytes(split, True) <= CARDS["H200"].shared_bytes


@pytest.mark.parametrize("form", ["int4", "bf16", "int8"])
def test_partial_sums_never_take_more_than_is_planned(form: str) -> None:
    """Cards without clusters, from a slice of an A100 to the largest of today."""
    draw = random.Random(form)
    ops = {"int4": "linear_int4", "bf16": "linear", "int8": "linear_int8"}
    bounds = StepBounds(step_tokens=2048, max_sequences=64, context_tokens=4096)
    n_split = 0
    for _ in range(1500):
        n_in = draw.choice((64 * draw.randrange(1, 448), 4096, 14336, 18944, 28672))
        n_out = draw.choice((16 * draw.randrange(1, 2000), 17, 272, 28672, 128256, 262144))
        n_tokens = draw.randrange(1, 17 if form == "int4" else 9)
        card = Card(
            processors=draw.choice((28, 58, 82, 108, 128, 142, 170, 188)),
            processor_shared_bytes=draw.choice((100, 164, 228)) << 10,
            clusters=False,
        )
        product = make(form, n_in, n_out, n_tokens, draw.choice((32, 64, 128)))
        try:
            split = choose(product.in_bucket, card)
        except EngineError:  # beyond any model: see the test of the largest heads
            continue
        assert split.columns <= MOST_COLUMNS
        if split.splits == 1:
            continue
        n_split += 1
        max_rows = 8 if n_tokens <= 8 else 16
        case = Case(op=ops[form], target="sm_86", dtype="bfloat16", n_out=n_out, n_in=n_in, max_rows=max_rows)
        assert product.partial_bytes(split) <= stream_bytes(case, bounds), (card, n_in, n_out, n_tokens)
    assert n_split > 300


@pytest.mark.parametrize("group", [32, 128])
def test_the_largest_heads_fit_on_small_cards(group: int) -> None:
    """A slice of an A100, an RTX 3060, an L4 and an L40."""
    cards = ((14, 164), (28, 100), (58, 100), (142, 100))
    for n_in, n_out in ((8192, 152064), (5376, 262144), (12288, 131072), (12288, 57344)):
        for processors, kib in cards:
            card = Card(processors=processors, processor_shared_bytes=kib << 10, clusters=False)
            for form, n_tokens in (("int4", 9), ("int4", 16), ("int8", 8)):
                product = make(form, n_in, n_out, n_tokens, group)
                assert product.shared_bytes(choose(product, card), False) <= card.shared_bytes


def test_a_card_with_clusters_needs_no_partial_sums_in_memory() -> None:
    case = Case(op="linear_int4", target="sm_90", dtype="bfloat16", n_out=4096, n_in=14336, max_rows=16)
    assert stream_bytes(case, StepBounds(step_tokens=8, max_sequences=8, context_tokens=64)) == 0


def test_the_layers_of_an_8b_shape_are_divided_as_measured() -> None:
    """The divisions behind the figures of docs/performance.md; a change here wants new figures."""
    card = CARDS["H200"]
    divisions = {
        (n_in, n_out, n_tokens): choose(make("int4", n_in, n_out, n_tokens), card)
        for n_in, n_out in LAYERS[:4]
        for n_tokens in (1, 8, 16)
    }
    plain = {key: (s.strip_warps, s.splits, s.columns, s.ring) for key, s in divisions.items()}
    assert plain == {
        (4096, 6144, 1): (2, 1, 132, 3),
        (4096, 4096, 1): (1, 2, 132, 4),
        (4096, 28672, 1): (2, 2, 132, 4),
        (14336, 4096, 1): (1, 2, 132, 4),
        (4096, 6144, 8): (1, 1, 132, 5),
        (4096, 4096, 8): (1, 1, 132, 5),
        (4096, 28672, 8): (2, 1, 132, 5),
        (14336, 4096, 8): (1, 2, 66, 5),
        (4096, 6144, 16): (2, 2, 66, 5),
        (4096, 4096, 16): (2, 2, 66, 5),
        (4096, 28672, 16): (4, 2, 66, 5),
        (14336, 4096, 16): (2, 8, 15, 4),
    }


def test_more_inputs_than_fit_are_refused_in_words() -> None:
    with pytest.raises(EngineError, match="do not fit"):
        choose(make("bf16", 1 << 20, 4096, 16), CARDS["RTX 3090"])


def test_what_cannot_be_streamed_says_why() -> None:
    code = torch.zeros(64, 132, dtype=torch.uint8)
    weight = pack(code, torch.ones(64, 1), None, torch.bfloat16)
    assert rejects(torch.zeros(1, 132, dtype=torch.bfloat16), weight) == (
        "rows of 132 inputs are no multiple of 16 bytes"
    )
    assert "float32" in (rejects(torch.zeros(1, 132), weight) or "")
    assert "131 inputs" in (rejects(torch.zeros(1, 131, dtype=torch.bfloat16), weight) or "")
    dense = torch.zeros(64, 128, dtype=torch.bfloat16)
    assert rejects(torch.zeros(1, 128, dtype=torch.bfloat16), dense) is None
    assert "contiguous" in (rejects(torch.zeros(1, 64, dtype=torch.bfloat16), dense[:, ::2]) or "")
    eight = Weight8(torch.zeros(64, 128, dtype=torch.int8), torch.ones(64))
    assert rejects(torch.zeros(1, 128, dtype=torch.int8), eight.values_OI) is None


def test_shifted_bits_of_e4m3_are_exact_halves() -> None:
    """What cards without fp8 products multiply: each value times 2 ** -8, subnormals included."""
    stored = torch.arange(256, dtype=torch.int32)
    moved = (stored & 0x80) << 8 | (stored & 0x7F) << 7
    halves = torch.where(moved < 1 << 15, moved, moved - (1 << 16)).to(torch.int16).view(torch.float16)
    truth = stored.to(torch.uint8).view(torch.float8_e4m3fn).float()
    is_number = ~truth.isnan()
    assert torch.equal(halves.float()[is_number] * 2.0**8, truth[is_number])
