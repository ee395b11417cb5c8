"""How a streamed product is divided among blocks and their warps, and what it then takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from sailfish.base.errors import EngineError
from sailfish.kernels.cuda.linear_limits import NORM_WIDTH
from sailfish.kernels.cuda.program import Defines
from sailfish.kernels.int4 import STRIP, UNIT

CHUNK_BYTES = 128
"""Bytes of an activation row that are multiplied at once."""
INT4_CHUNKS = 4
"""Chunks of a warp in a stage, as in the readers."""
_ROWS_CHUNKS = 2
_TILE = 8
"""Tokens of a tile."""
_PAD_BYTES = 16
_HEAD_BYTES = 128
_RESERVED_BYTES = 1024 + 384
"""Of shared memory, by the system in each block and by the kernel itself."""
_MOST_IN_CLUSTER = 8
_WARPS = 8
_PAIRED_TOKENS = 2
_FEW_STRIPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How a product is divided among blocks and their warps."""

    strip_warps: int
    """Strips of outputs that a stage of weights holds."""
    chunk_warps: int
    """Warps that share each of them."""
    splits: int = 1
    """Ranges of inputs, one for each block of a column."""
    columns: int
    """Ranges of outputs."""
    ring: int
    """Stages of weights in flight."""
    blocks: int = 1
    """That a processor has room for, of this product or of it and the next."""

    @property
    def warps(self) -> int:
        """Warps that multiply; one more copies."""
        return self.strip_warps * self.chunk_warps


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One product as the skeleton sees it."""

    file: str
    defines: Defines
    dtype: torch.dtype
    """Of what is returned."""
    n_tokens: int
    row_bytes: int
    n_out: int
    chunks: int
    plane_bytes: int = 0
    """Of the scales, and again of the zeros, of a warp's part of a stage."""
    span: int = 0
    """Inputs whose sum is kept, 0 if none is."""
    quantum: int = 1
    """Chunks that no split may part."""
    activation: str | None = None
    has_norm: bool = False
    is_8_bit: bool = False

    def norm_groups(self, split: Split) -> int:
        """Return the groups of a norm's inputs for each warp, a power of two, 0 without a norm."""
        if not self.has_norm:
            return 0
        groups = parts(self.n_tokens * self.row_bytes, 2 * NORM_WIDTH * split.warps)
        return 1 << (groups - 1).bit_length()

    @property
    def in_bucket(self) -> Product:
        """Return it with the tokens of the next captured step, whose division does for it.

        Or a step with another number of tokens might have to compile a kernel.
        """
        return replace(self, n_tokens=1 << (self.n_tokens - 1).bit_length())

    @property
    def is_for_pairs(self) -> bool:
        """Say whether tokens are so few that small blocks are best; bfloat16 weights take as long."""
        return self.n_tokens <= (_PAIRED_TOKENS if self.span else int(self.is_8_bit))

    @property
    def tiles(self) -> int:
        """Return the tiles of 8 tokens, a power of two."""
        return 1 << (parts(self.n_tokens, _TILE) - 1).bit_length()

    def strips_per_block(self, split: Split) -> int:
        """Return the most strips of one block."""
        return parts(self.strips, split.columns)

    @property
    def strips(self) -> int:
        """Return the strips of 16 outputs."""
        return parts(self.n_out, STRIP)

    def block_chunks(self, split: Split) -> int:
        """Return the most chunks of one range of inputs."""
        return parts(parts(self.chunks, self.quantum), split.splits) * self.quantum

    def stage_bytes(self, split: Split) -> int:
        """Return the shared memory of a stage of weights."""
        if self.span:
            return split.warps * (INT4_CHUNKS * STRIP * UNIT // 2 + 2 * self.plane_bytes)
        return split.strip_warps * STRIP * (split.chunk_warps * _ROWS_CHUNKS * CHUNK_BYTES + _PAD_BYTES)

    def partial_bytes(self, split: Split) -> int:
        """Return the partial sums of all blocks in device memory, where they form no clusters."""
        n_strips = split.columns * split.splits * self.strips_per_block(split)
        return n_strips * STRIP * self.tiles * _TILE * 4

    def shared_bytes(self, split: Split, clusters: bool) -> int:
        """Return what the skeleton lays out: barriers, ring, partial sums, sums of x, x."""
        tokens = self.tiles * _TILE
        owners = split.splits if clusters else 1
        slots = parts(self.strips_per_block(split), owners)
        chunks = self.block_chunks(split)
        is_partial = split.splits * split.chunk_warps > 1
        return (
            _HEAD_BYTES
            + split.ring * self.stage_bytes(split)
            + (owners * split.chunk_warps * slots * STRIP * tokens * 4 if is_partial else 0)
            + (chunks * UNIT // self.span * tokens * 4 if self.span else 0)
            + self.n_tokens * (chunks * CHUNK_BYTES + _PAD_BYTES)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What the division of a product depends on."""

    processors: int
    processor_shared_bytes: int
    clusters: bool
    """Blocks can write to each other's shared memory."""

    @property
    def shared_bytes(self) -> int:
        """Return the most shared memory of a block."""
        return self.processor_shared_bytes - _RESERVED_BYTES

    @property
    def half_bytes(self) -> int:
        """Return the most shared memory of a block that leaves room for another."""
        return self.processor_shared_bytes // 2 - _RESERVED_BYTES

    def blocks(self, splits: int) -> int:
        """Return the blocks that run at once in clusters of `splits`: some GPCs of an H200 are smaller."""
        return self.processors * 10 // 11 if self.clusters and splits > 2 else self.processors


@lru_cache(maxsize=1024)
def choose(product: Product, card: Card) -> Split:
    """Return how a product is divided on a card: the first of the measured orders that fits."""
    if card.clusters and product.is_for_pairs:
        for split in _pairs(product, card):
            room = card.half_bytes if split.blocks == 2 else card.shared_bytes
            if product.shared_bytes(split, card.clusters) <= room:
                return split
    for split in _orders(product, card):
        if product.shared_bytes(split, card.clusters) <= card.shared_bytes:
            return split
    raise EngineError(
        f"{product.n_tokens} tokens of {product.row_bytes} bytes do not fit beside {product.n_out} outputs"
    )


def _pairs(product: Product, card: Card) -> Iterator[Split]:
    """Yield divisions for very few tokens into small blocks, of which a processor has room for two.

    Measured on an H200 in a chain of whole layers: what a processor that is free early takes of the next
    product is then small, and at the end of it all have had as much. A layer of an 8B shape in 4 bits took
    44 us, against 65 with one block of all inputs a processor; in 8 bits 71 against 73. Clusters of two
    halve x. Products of a few strips a processor want as many warps in one block, which read x once; heads
    have more outputs than sums fit beside it, and take many blocks.
    """
    if not product.span:
        pair = Split(strip_warps=1, chunk_warps=4, splits=2, columns=card.processors, ring=4, blocks=2)
        if product.chunks >= 2:
            yield pair
        return
    if 2 <= product.strips // card.processors < _FEW_STRIPS and product.n_tokens == 1:
        yield Split(strip_warps=2, chunk_warps=_WARPS, columns=card.processors, ring=3)
    for (splits, rounds), ring in itertools.product(((2, 1), (1, 4), (1, 8), (1, 16)), (4, 3)):
        columns = card.processors * rounds
        strip_warps = 2 if product.strips >= 2 * columns else 1
        if splits <= _parts_of_inputs(product):
            yield Split(
                strip_warps=strip_warps,
                chunk_warps=_WARPS // strip_warps,
                splits=splits,
                columns=columns,
                ring=ring,
                blocks=2,
            )


def _parts_of_inputs(product: Product) -> int:
    return parts(product.chunks, product.quantum)


def _orders(product: Product, card: Card) -> Iterator[Split]:
    """Yield divisions, the best first.

    Measured on an H200. Longer runs of a strip make larger copies, so few strips in a stage are better; but
    partial sums of many strips need too much shared memory. One block of all inputs a column is best while
    x fits; for 9 and more tokens pairs of blocks that halve x are. Clusters of 8 are for what does not fit
    otherwise; clusters of 4 were never better than they.
    """
    narrow, wide = ((1, 1),), ((2, 1), (4, 1), (8, 1))  # strips in a stage, and blocks that a processor runs
    many = ((4, 1), (4, 2), (4, 4)) if card.clusters else ((4, 1),)
    per_block = product.strips // card.processors
    if not product.span:
        yield from _divided(product, card, (1, 2, 8, 16), ((1, 1), (1, 2), (1, 4), (1, 8)), (4, 3))
    elif product.tiles == 1:
        yield from _divided(product, card, (1, 2, 8, 16), wide if per_block >= 4 else narrow, (5, 4, 3))
    else:
        yield from _divided(product, card, (2, 8), many if per_block >= 8 else ((2, 1),), (5, 4, 3))
    small = (*wide, (4, 2), (4, 4), (8, 8), (8, 32), (8, 64))
    yield from _divided(product, card, (1, 2, 4, 8, 16, 32, 64), small, (5, 4, 3, 2))
    # Very many outputs beside very many inputs: blocks of a few strips each.
    yield from _divided(product, card, (8, 16, 32, 64), ((8, 128), (8, 256)), (2,))


def _divided(
    product: Product,
    card: Card,
    all_splits: tuple[int, ...],
    forms: tuple[tuple[int, int], ...],
    rings: tuple[int, ...],
) -> Iterator[Split]:
    quanta = _parts_of_inputs(product)
    for splits, (strip_warps, rounds), ring in itertools.product(all_splits, forms, rings):
        if splits <= min(quanta, _MOST_IN_CLUSTER if card.clusters else quanta):
            yield Split(
                strip_warps=strip_warps,
                chunk_warps=_WARPS // strip_warps,
                splits=splits,
                columns=max(1, card.blocks(splits) // splits) * rounds,
                ring=ring,
                blocks=2 if product.tiles == 1 and not card.clusters else 1,
            )


def parts(n: int, size: int) -> int:
    """Return how many parts of a size hold n."""
    return -(-n // size)
