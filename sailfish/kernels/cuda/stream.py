"""Multiplies few tokens with streamed weights in bfloat16, INT8, FP8 and INT4: division, checks, launches."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from sailfish.base.errors import EngineError
from sailfish.kernels.contract import Quantised, Weight8
from sailfish.kernels.cuda import program
from sailfish.kernels.cuda.program import Defines, Variant
from sailfish.kernels.int4 import GROUPS, STRIP, UNIT, Int4Weight

MAX_TOKENS = 16
_TILE = 8
"""Tokens of a tile."""
_CHUNK_BYTES = 128
"""Bytes of an activation row that are multiplied at once."""
_PAD_BYTES = 16
_HEAD_BYTES = 128
_RESERVED_BYTES = 1024 + 128
"""Of shared memory, by the system in each block and by the kernel itself."""
_MOST_COLUMNS = 1 << 14
"""Columns of blocks that may have to add up: half of 512 multiprocessors times 64."""
_MOST_IN_CLUSTER = 8
_WARPS = 8
_INT4_CHUNKS = 4
"""Chunks of a warp in a stage, as in the readers."""
_ROWS_CHUNKS = 2
_PLAIN, _INT8, _FP8 = 0, 1, 2
_DTYPES = (torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)


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

    @property
    def tiles(self) -> int:
        """Return the tiles of 8 tokens, a power of two."""
        return 1 << (_parts(self.n_tokens, _TILE) - 1).bit_length()

    def strips_per_block(self, split: Split) -> int:
        """Return the most strips of one block."""
        return _parts(self.strips, split.columns)

    @property
    def strips(self) -> int:
        """Return the strips of 16 outputs."""
        return _parts(self.n_out, STRIP)

    def block_chunks(self, split: Split) -> int:
        """Return the most chunks of one range of inputs."""
        return _parts(_parts(self.chunks, self.quantum), split.splits) * self.quantum

    def stage_bytes(self, split: Split) -> int:
        """Return the shared memory of a stage of weights."""
        if self.span:
            return split.warps * (_INT4_CHUNKS * STRIP * UNIT // 2 + 2 * self.plane_bytes)
        return split.strip_warps * STRIP * (split.chunk_warps * _ROWS_CHUNKS * _CHUNK_BYTES + _PAD_BYTES)

    def partial_bytes(self, split: Split) -> int:
        """Return the partial sums of all blocks in device memory, where they form no clusters."""
        n_strips = split.columns * split.splits * self.strips_per_block(split)
        return n_strips * STRIP * self.tiles * _TILE * 4

    def shared_bytes(self, split: Split, clusters: bool) -> int:
        """Return what the skeleton lays out: barriers, ring, partial sums, sums of x, x."""
        tokens = self.tiles * _TILE
        owners = split.splits if clusters else 1
        slots = _parts(self.strips_per_block(split), owners)
        chunks = self.block_chunks(split)
        is_partial = split.splits * split.chunk_warps > 1
        return (
            _HEAD_BYTES
            + split.ring * self.stage_bytes(split)
            + (owners * split.chunk_warps * slots * STRIP * tokens * 4 if is_partial else 0)
            + (chunks * UNIT // self.span * tokens * 4 if self.span else 0)
            + self.n_tokens * (chunks * _CHUNK_BYTES + _PAD_BYTES)
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


class _Shape(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("n_tokens", ctypes.c_int),
        ("row_bytes", ctypes.c_int),
        ("n_out", ctypes.c_int),
        ("strips", ctypes.c_int),
        ("chunks", ctypes.c_int),
        ("quantum", ctypes.c_int),
        ("block_chunks", ctypes.c_int),
        ("strips_per_block", ctypes.c_int),
    )


class _Output(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("y", "bias", "residual", "row_scale", "token_scale", "workspace", "arrived")
    )


def linear_int4(
    x_TI: Tensor,
    weight: Int4Weight,
    bias_O: Tensor | None = None,
    residual_TO: Tensor | None = None,
    *,
    split: Split | None = None,
    after: bool = True,
) -> Tensor:
    """Return x @ weight.T + bias (+ residual), x in the dtype of the scales.

    Made for at most MAX_TOKENS tokens; more are multiplied in passes, each of which reads the weight.
    `split` overrides how the work is divided, `after` says whether the launch may begin early.
    """
    _refuse(rejects(x_TI, weight))
    group = weight.group if weight.group in GROUPS else 0
    span = group or UNIT
    product = Product(
        file="stream_int4.cu",
        defines=(("GROUP", group),),
        dtype=x_TI.dtype,
        n_tokens=x_TI.shape[0],
        row_bytes=x_TI.shape[1] * 2,
        n_out=weight.n_out,
        plane_bytes=_INT4_CHUNKS * UNIT // group * STRIP * 2 if group else 0,
        chunks=weight.packed.shape[1],
        span=span,
        quantum=max(1, span // UNIT),
    )
    tensors = (weight.packed, weight.scale, weight.zero)
    return _run(product, x_TI, tensors, bias_O, residual_TO, None, None, split, after)


def linear_bf16(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    residual_TO: Tensor | None = None,
    *,
    split: Split | None = None,
    after: bool = True,
) -> Tensor:
    """Return x @ weight.T + bias (+ residual), both in bfloat16 or both in float16; see linear_int4."""
    _refuse(rejects(x_TI, weight_OI))
    product = _rows(_PLAIN, x_TI, weight_OI, x_TI.dtype)
    return _run(product, x_TI, (weight_OI,), bias_O, residual_TO, None, None, split, after)


def linear_8(
    x: Quantised,
    weight: Weight8,
    bias_O: Tensor | None = None,
    residual_TO: Tensor | None = None,
    *,
    split: Split | None = None,
    after: bool = True,
) -> Tensor:
    """Return scale_x * scale_weight * (x @ weight.T) + bias (+ residual), int8 or fp8; see linear_int4."""
    values_TI, values_OI = x.values_TI, weight.values_OI
    _refuse(rejects(values_TI, values_OI))
    product = _rows(_INT8 if values_OI.dtype == torch.int8 else _FP8, values_TI, values_OI, x.dtype)
    return _run(
        product, values_TI, (values_OI,), bias_O, residual_TO, weight.scale_O, x.scale_T, split, after
    )


def rejects(x_TI: Tensor, weight: Tensor | Int4Weight) -> str | None:
    """Say why a product cannot be streamed, or return None."""
    if isinstance(weight, Int4Weight):
        n_in, dtype, packed = weight.n_in, weight.scale.dtype, weight.packed
    else:
        n_in, dtype, packed = weight.shape[1], weight.dtype, weight
    if x_TI.dtype != dtype or dtype not in _DTYPES:
        return f"activations are {x_TI.dtype}, weights {dtype}"
    if x_TI.shape[1] != n_in:
        return f"a token has {x_TI.shape[1]} inputs, the weight {n_in}"
    if n_in * x_TI.element_size() % 16:
        return f"rows of {n_in} inputs are no multiple of 16 bytes"
    if not packed.is_contiguous():
        return "the weight is not contiguous"
    return None


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise EngineError(f"cannot stream this weight: {reason}")


def _rows(form: int, x_TI: Tensor, weight_OI: Tensor, dtype: torch.dtype) -> Product:
    row_bytes = x_TI.shape[1] * x_TI.element_size()
    return Product(
        file="stream_rows.cu",
        defines=(("FORMAT", form),),
        dtype=dtype,
        n_tokens=x_TI.shape[0],
        row_bytes=row_bytes,
        n_out=weight_OI.shape[0],
        chunks=_parts(row_bytes, _CHUNK_BYTES),
    )


def _run(
    product: Product,
    x_TI: Tensor,
    weight: tuple[Tensor | None, ...],
    bias_O: Tensor | None,
    residual_TO: Tensor | None,
    row_scale_O: Tensor | None,
    token_scale_T: Tensor | None,
    split: Split | None,
    after: bool,
) -> Tensor:
    x_TI = x_TI.contiguous()
    y_TO = torch.empty(product.n_tokens, product.n_out, dtype=product.dtype, device=x_TI.device)
    if product.n_tokens <= MAX_TOKENS:
        if product.n_tokens:
            _launch(
                product, x_TI, weight, y_TO, bias_O, residual_TO, row_scale_O, token_scale_T, split, after
            )
        return y_TO
    for start in range(0, product.n_tokens, MAX_TOKENS):
        rows = slice(start, start + MAX_TOKENS)
        part_TI, residual, scale_T = (
            None if tensor is None else tensor[rows] for tensor in (x_TI, residual_TO, token_scale_T)
        )
        assert part_TI is not None
        part = replace(product, n_tokens=len(part_TI))
        _launch(part, part_TI, weight, y_TO[rows], bias_O, residual, row_scale_O, scale_T, split, after)
    return y_TO


def _launch(
    product: Product,
    x_TI: Tensor,
    weight: tuple[Tensor | None, ...],
    y_TO: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor | None,
    row_scale_O: Tensor | None,
    token_scale_T: Tensor | None,
    split: Split | None,
    after: bool,
) -> None:
    card = this_card()
    split = split or choose(product, card)
    shared_bytes = product.shared_bytes(split, card.clusters)
    if card.clusters and (product.n_tokens > 1 or not product.span):
        # A processor that is free early would take two blocks of the next product, and keep all waiting.
        shared_bytes = max(shared_bytes, card.half_bytes + 1)
    per_block = product.strips_per_block(split)
    shape = _Shape(
        x_TI.data_ptr(),
        product.n_tokens,
        product.row_bytes,
        product.n_out,
        product.strips,
        product.chunks,
        product.quantum,
        product.block_chunks(split),
        per_block,
    )
    workspace = arrived = None
    if split.splits > 1 and not card.clusters:
        assert split.columns <= _MOST_COLUMNS, "more than there are counters"
        n_bytes = product.partial_bytes(split)
        workspace = torch.empty(n_bytes, dtype=torch.uint8, device=x_TI.device)
        arrived = _counters(x_TI.device)
    pointers = (y_TO, bias_O, residual_TO, row_scale_O, token_scale_T, workspace, arrived)
    out = _Output(*(None if tensor is None else tensor.data_ptr() for tensor in pointers))
    defines = _defines(product.dtype, product.defines, product.tiles, split)
    program.kernel(product.file, product.file.removesuffix(".cu"), defines).launch(
        (split.columns * split.splits,),
        split.warps * 32 + 32,
        (shape, out, *weight),
        program.stream(),
        shared_bytes=shared_bytes,
        after=after,
        cluster=split.splits if card.clusters else 1,
    )


@lru_cache(maxsize=1024)
def choose(product: Product, card: Card) -> Split:
    """Return how a product is divided on a card: the first of the measured orders that fits."""
    if product.span and product.n_tokens == 1 and card.clusters:
        # Two blocks on a processor: the next product's copies begin early.
        for split in _orders(product, card):
            is_measured = split.strip_warps <= 2 and split.ring >= 3
            if is_measured and product.shared_bytes(split, card.clusters) <= card.half_bytes:
                return split
    for split in _orders(product, card):
        if product.shared_bytes(split, card.clusters) <= card.shared_bytes:
            return split
    raise EngineError(
        f"{product.n_tokens} tokens of {product.row_bytes} bytes do not fit beside {product.n_out} outputs"
    )


def _orders(product: Product, card: Card) -> Iterator[Split]:
    """Yield divisions, the best first.

    Measured on an H200. Longer runs of a strip make larger copies, so few strips in a stage are better; but
    partial sums of many strips need too much shared memory. One block of all inputs a column is best while
    x fits; for 9 and more tokens pairs of blocks that halve x are. Clusters of 8 are for what does not fit
    otherwise; clusters of 4 were never better than they.
    """
    narrow, wide = ((1, 1),), ((2, 1), (4, 1), (8, 1))  # strips in a stage, and blocks that a processor runs
    per_block = product.strips // card.processors
    if not product.span:
        yield from _divided(product, card, (1, 2, 8, 16), ((1, 1), (1, 2), (1, 4), (1, 8)), (4, 3))
    elif product.tiles == 1:
        yield from _divided(product, card, (1, 2, 8, 16), wide if per_block >= 4 else narrow, (5, 4, 3))
    else:
        yield from _divided(product, card, (2, 8), ((4, 1) if per_block >= 8 else (2, 1),), (5, 4, 3))
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
    quanta = _parts(product.chunks, product.quantum)
    for splits, (strip_warps, rounds), ring in itertools.product(all_splits, forms, rings):
        if splits <= min(quanta, _MOST_IN_CLUSTER if card.clusters else quanta):
            yield Split(
                strip_warps=strip_warps,
                chunk_warps=_WARPS // strip_warps,
                splits=splits,
                columns=max(1, card.blocks(splits) // splits) * rounds,
                ring=ring,
            )


def this_card() -> Card:
    """Return the current device as the skeleton sees it."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Card(
        processors=properties.multi_processor_count,
        processor_shared_bytes=properties.shared_memory_per_multiprocessor,
        clusters=program.architecture() == "sm_90a",
    )


@cache
def _counters(device: torch.device) -> Tensor:
    """Return zeros, one for each column of blocks; a kernel leaves zeros behind."""
    return torch.zeros(_MOST_COLUMNS, dtype=torch.int32, device=device)


def _parts(n: int, size: int) -> int:
    return -(-n // size)


def _defines(dtype: torch.dtype, defines: Defines, tiles: int, split: Split) -> Defines:
    return (
        ("DTYPE", 16 if dtype == torch.float16 else 0),
        *defines,
        ("TILES", tiles),
        ("STRIP_WARPS", split.strip_warps),
        ("CHUNK_WARPS", split.chunk_warps),
        ("BLOCK_SPLITS", split.splits),
        ("RING", split.ring),
        ("BLOCKS_PER_PROCESSOR", 2 if tiles == 1 else 1),
    )


VARIANTS = tuple(
    Variant(file, _defines(dtype, (define,), tiles, split))
    for file, define in (
        *(("stream_int4.cu", ("GROUP", group)) for group in (0, *GROUPS)),
        *(("stream_rows.cu", ("FORMAT", form)) for form in (_PLAIN, _INT8, _FP8)),
    )
    for dtype in (torch.bfloat16, torch.float16)
    for tiles in (1, 2)
    for split in (
        Split(strip_warps=1, chunk_warps=8, splits=1, columns=1, ring=4),
        Split(strip_warps=4, chunk_warps=2, splits=2, columns=1, ring=3),
    )
)
"""The ways that differ most; ring depths and the rest change little but the layout of shared memory."""
