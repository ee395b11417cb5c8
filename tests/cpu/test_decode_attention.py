"""What decode attention rests on, in Python: how work is dealt, how bytes widen, what lanes hold."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sailfish.kernels.cuda.decode_attention import VARIANTS, _shape, rejects

FEWEST = 8
SMALL_CARD_BYTES = 99 << 10
FP8_FACTOR = 2.0**120


@dataclass(frozen=True)
class Piece:
    """Tiles first .. end - 1 of a sequence, which one block takes."""

    block: int
    sequence: int
    first: int
    end: int


def deal(tiles: list[int], n_blocks: int) -> list[Piece]:
    """Model `Deal` and `Deal::run` of decode_attention.cuh, for sequences of so many tiles."""
    total, longest, n = sum(tiles), max(tiles), len(tiles)
    fair = -(-total // n_blocks)
    if n <= n_blocks:
        splits = 1 if longest <= 2 * FEWEST else min(n_blocks // n, -(-longest // FEWEST))
        if -(-longest // splits) <= max(2 * FEWEST, fair + fair // 8):
            return [
                Piece(b * splits + i, b, count * i // of, count * (i + 1) // of)
                for b, count in enumerate(tiles)
                for of in (min(splits, -(-count // FEWEST)),)
                for i in range(of)
            ]
    parts = min(n_blocks, -(-total // FEWEST))
    rounds = -(-n // n_blocks)
    whole = n // rounds
    if total == n * longest and whole * rounds == n and whole * 16 >= n_blocks * 15:
        parts = whole
    each, extra = divmod(total, parts)
    starts = [part * each + min(part, extra) for part in range(parts + 1)]
    before = [sum(tiles[:b]) for b in range(n + 1)]
    return [
        Piece(part, b, max(start, before[b]) - before[b], min(end, before[b + 1]) - before[b])
        for part, (start, end) in enumerate(zip(starts, starts[1:], strict=False))
        for b in range(n)
        if start < before[b + 1] and end > before[b]
    ]


@given(st.lists(st.integers(1, 700), min_size=1, max_size=60), st.integers(1, 140))
def test_every_tile_is_dealt_once_and_a_block_leaves_at_most_one_part(
    tiles: list[int], n_blocks: int
) -> None:
    """Or none: a part is a piece without its sequence's end, in the block's only slot."""
    pieces = deal(tiles, n_blocks)
    for b, count in enumerate(tiles):
        mine = [piece for piece in pieces if piece.sequence == b]
        assert [piece.first for piece in mine] == [0] + [piece.end for piece in mine[:-1]]
        assert mine[-1].end == count
        blocks = [piece.block for piece in mine]
        assert blocks == list(range(blocks[0], blocks[0] + len(mine))), "summed from the first block on"
    parts = [piece.block for piece in pieces if piece.end < tiles[piece.sequence]]
    assert len(parts) == len(set(parts))
    assert max(piece.block for piece in pieces) < n_blocks


@pytest.mark.parametrize(
    ("tiles", "n_blocks"), [([64], 16), ([512] * 64, 16), ([64] * 16, 16), ([2048] * 2, 4)]
)
def test_equal_sequences_are_dealt_equally(tiles: list[int], n_blocks: int) -> None:
    """No block has more than a fair share, rounded up."""
    shares = torch.zeros(n_blocks)
    for piece in deal(tiles, n_blocks):
        shares[piece.block] += piece.end - piece.first
    assert shares.max() <= max(FEWEST, -(-sum(tiles) // n_blocks))


def as_bfloat16(bits: Tensor) -> Tensor:
    """Read 16-bit patterns, held in int32, as bfloat16."""
    return bits.to(torch.int16).view(torch.bfloat16).float()


def test_int8_widens_to_bfloat16_exactly() -> None:
    """`widen` of int8: 128 + the low seven bits, less 128, or 256 for a negative one."""
    stored = torch.arange(-128, 128)
    low, base = stored & 0x7F | 0x4300, stored & 0x80 | 0x4300
    assert torch.equal(as_bfloat16(low) - as_bfloat16(base), stored.float())


def test_int8_widens_to_float16_with_a_constant_too_much() -> None:
    """`widen_k` of int8: 1152 more than the value, for every key alike."""
    stored = torch.arange(-128, 128)
    bits = (stored & 0xFF) ^ 0x6480
    assert torch.equal(bits.to(torch.int16).view(torch.float16).float(), stored.float() + 1152)


def test_fp8_widens_to_bfloat16_exactly() -> None:
    """`widen` of e4m3: the same digits at bfloat16's places are 2^-120 of the value, subnormals too."""
    stored = torch.arange(256)
    value = stored.to(torch.uint8).view(torch.float8_e4m3fn).float()
    bits = (stored << 8 & 0x8000) | (stored << 4 & 0x07F0)
    is_number = ~value.isnan()
    assert torch.equal((as_bfloat16(bits).double() * FP8_FACTOR)[is_number], value.double()[is_number])


def transposed_fragments(tile_bytes: Tensor) -> Tensor:
    """Return what ldmatrix.trans gives of a tile of 16 tokens by 16 bytes: [lane, matrix, byte]."""
    lanes = torch.empty(32, 2, 4, dtype=tile_bytes.dtype)
    for lane in range(32):
        for matrix in range(2):
            for half in range(2):
                token, pair = matrix * 8 + 2 * (lane % 4) + half, lane // 4
                lanes[lane, matrix, 2 * half : 2 * half + 2] = tile_bytes[token, 2 * pair : 2 * pair + 2]
    return lanes


def test_lanes_hold_the_outputs_that_are_written_for_them() -> None:
    """8-bit V as the A operand: register i of a lane is element 2 * (lane / 4) + i % 2, tokens by i / 2."""
    tile = torch.arange(256).view(16, 16)
    lanes = transposed_fragments(tile)
    for lane in range(32):
        for i in range(4):
            low, high = lanes[lane, i // 2, i % 2], lanes[lane, i // 2, 2 + i % 2]
            token, element = i // 2 * 8 + 2 * (lane % 4), 2 * (lane // 4) + i % 2
            assert (low, high) == (tile[token, element], tile[token + 1, element])


def test_queries_are_paired_as_keys_widen() -> None:
    """A row of q in shared memory, read as the B operand, meets the bytes that K's words hold."""
    q, k = torch.randn(16), torch.randn(16)
    laid = torch.empty(16)
    for e in (0, 8):  # `copy_q`: elements 0 and 2 of each four to the first half, 1 and 3 to the second
        half = e // 2
        laid[half : half + 4] = q[e + torch.tensor([0, 2, 4, 6])]
        laid[half + 8 : half + 12] = q[e + torch.tensor([1, 3, 5, 7])]
    total = torch.zeros(())
    for c in range(4):  # lanes of one token: a word of K is elements 4c .. 4c + 3
        even, odd = k[4 * c : 4 * c + 4 : 2], k[4 * c + 1 : 4 * c + 4 : 2]
        total += even @ laid[2 * c : 2 * c + 2] + odd @ laid[8 + 2 * c : 10 + 2 * c]
    assert torch.allclose(total, q @ k, atol=1e-5)


@pytest.mark.parametrize("is_many", [False, True])
def test_rows_lie_in_distinct_banks(is_many: bool) -> None:
    """Eight rows' 16-byte words: padded rows, or 128-byte rows whose words are swapped as the engine does."""
    for is_hopper in (False, True):
        shape = _shape(128, 0, 1, is_hopper, is_many)
        for k in range(8):
            if shape.is_bulk:
                words = {(row * 128 + (((k * 2) % 8 ^ row) << 4)) % 128 for row in range(8)}
            else:
                words = {(row * (shape.row_bytes + 16) + k * 32) % 128 for row in range(8)}
            assert len(words) == 8


def test_small_cards_have_room_for_every_variant() -> None:
    """A block may take 99 KiB of shared memory on sm_86 and sm_89."""
    for variant in VARIANTS:
        if "sm_86" in variant.only:
            assert dict(variant.defines)["MOST_SHARED_BYTES"] <= SMALL_CARD_BYTES, variant


def test_models_it_cannot_serve_are_told_why() -> None:
    """Words for each limit, and none for a model within them."""
    assert rejects(128, 16, "bfloat16", 4) is None
    assert "float32" in (rejects(128, 16, "float32", 4) or "")
    assert "72" in (rejects(72, 16, "bfloat16", 4) or "")
    assert "8 tokens a block" in (rejects(128, 8, "bfloat16", 4) or "")
    assert "multiple of 32" in (rejects(80, 16, "bfloat16", 4, kv_bits=8) or "")
    assert "12 queries" in (rejects(128, 16, "bfloat16", 1, n_queries=12) or "")
    assert "more than 32" in (rejects(128, 16, "bfloat16", 16, n_queries=3) or "")
