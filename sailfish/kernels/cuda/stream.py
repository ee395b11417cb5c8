"""Linear layers for few tokens that stream their weights: bfloat16, INT8, FP8 and INT4 readers of one skeleton."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sailfish.base.errors import EngineError
from sailfish.kernels.contract import Quantised, Weight8
from sailfish.kernels.cuda.program import Defines, Variant, architecture, kernel, n_processors, stream
from sailfish.kernels.int4 import GROUPS, STRIP, UNIT, Int4Weight

MAX_TOKENS = 64
_TILE = 8
"""Tokens of a tile."""
_CHUNK_BYTES = 128
"""Bytes of an activation row that are multiplied at once."""
_X_PAD_BYTES = 16
_HEAD_BYTES = 16
_INT4_STAGE = 4
"""Chunks of a stage, as in the readers."""
_ROWS_STAGE = 2
_PLAIN, _INT8, _FP8 = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How a product is divided: among blocks, their warps, and the stages of a warp's ring."""

    warps: int
    warp_splits: int
    """Ranges of inputs that the warps of a block share."""
    splits: int
    """Ranges of inputs that the blocks of a column share."""
    columns: int
    """Ranges of outputs."""
    ring: int
    """Stages of weights in flight in each warp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """One product as the skeleton sees it."""

    file: str
    defines: Defines
    dtype: torch.dtype
    """Of what is returned."""
    n_tokens: int
    row_bytes: int
    n_out: int
    stage_bytes: int
    chunks: int
    span: int = 0
    """Inputs whose sum is kept, 0 if none is."""
    quantum: int = 1
    """Chunks that no split may part."""

    @property
    def tiles(self) -> int:
        return 1 << (-(-self.n_tokens // _TILE) - 1).bit_length()

    def strips_per_block(self, split: Split) -> int:
        return -(-self.strips // split.columns)

    @property
    def strips(self) -> int:
        return -(-self.n_out // STRIP)

    def part_chunks(self, parts: int) -> int:
        """Return the most chunks of one of `parts` ranges."""
        return -(-(-(-self.chunks // self.quantum)) // parts) * self.quantum

    def shared_bytes(self, split: Split) -> int:
        """Return what the skeleton lays out: head, rings, partial sums, sums of x, x."""
        tokens = self.tiles * _TILE
        parts = split.warp_splits * split.splits
        owners = split.splits if has_clusters() else 1
        slots = -(-self.strips_per_block(split) // owners)
        block_chunks = self.part_chunks(split.splits)
        return (
            _HEAD_BYTES
            + split.warps * split.ring * self.stage_bytes
            + (owners * split.warp_splits * slots * STRIP * tokens * 4 if parts > 1 else 0)
            + (split.warps * (self.part_chunks(parts) * UNIT // self.span) * tokens * 4 if self.span else 0)
            + self.n_tokens * (block_chunks * _CHUNK_BYTES + _X_PAD_BYTES)
        )


class _Shape(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("n_tokens", ctypes.c_int),
        ("row_bytes", ctypes.c_int),
        ("n_out", ctypes.c_int),
        ("strips", ctypes.c_int),
        ("chunks", ctypes.c_int),
        ("quantum", ctypes.c_int),
        ("part_chunks", ctypes.c_int),
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
    """Return x @ weight.T + bias (+ residual) for at most MAX_TOKENS tokens, x in the dtype of the scales."""
    group = weight.group if weight.group in GROUPS else 0
    span = group or UNIT
    plane_bytes = _INT4_STAGE * UNIT // group * STRIP * 2 if group else 0
    product = _Product(
        file="stream_int4.cu",
        defines=(("GROUP", group),),
        dtype=x_TI.dtype,
        n_tokens=x_TI.shape[0],
        row_bytes=x_TI.shape[1] * 2,
        n_out=weight.n_out,
        stage_bytes=_INT4_STAGE * STRIP * UNIT // 2 + 2 * plane_bytes,
        chunks=weight.packed.shape[1],
        span=span,
        quantum=max(1, span // UNIT),
    )
    return _run(product, x_TI, (weight.packed, weight.scale, weight.zero), bias_O, residual_TO, split=split, after=after)


def linear_bf16(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    residual_TO: Tensor | None = None,
    *,
    split: Split | None = None,
    after: bool = True,
) -> Tensor:
    """Return x @ weight.T + bias (+ residual) for at most MAX_TOKENS tokens, in bfloat16 or float16."""
    product = _rows(_PLAIN, x_TI, weight_OI, x_TI.dtype)
    return _run(product, x_TI, (weight_OI,), bias_O, residual_TO, split=split, after=after)


def linear_8(
    x: Quantised,
    weight: Weight8,
    bias_O: Tensor | None = None,
    residual_TO: Tensor | None = None,
    *,
    split: Split | None = None,
    after: bool = True,
) -> Tensor:
    """Return scale_x * scale_weight * (x @ weight.T) + bias (+ residual) for at most MAX_TOKENS tokens."""
    form = _INT8 if weight.values_OI.dtype == torch.int8 else _FP8
    product = _rows(form, x.values_TI, weight.values_OI, x.dtype)
    return _run(
        product,
        x.values_TI,
        (weight.values_OI,),
        bias_O,
        residual_TO,
        weight.scale_O,
        x.scale_T,
        split=split,
        after=after,
    )


def _rows(form: int, x_TI: Tensor, weight_OI: Tensor, dtype: torch.dtype) -> _Product:
    row_bytes = x_TI.shape[1] * x_TI.element_size()
    return _Product(
        file="stream_rows.cu",
        defines=(("FORMAT", form),),
        dtype=dtype,
        n_tokens=x_TI.shape[0],
        row_bytes=row_bytes,
        n_out=weight_OI.shape[0],
        stage_bytes=_ROWS_STAGE * STRIP * _CHUNK_BYTES,
        chunks=-(-row_bytes // _CHUNK_BYTES),
    )


def _run(
    product: _Product,
    x_TI: Tensor,
    weight: tuple[Any, ...],
    bias_O: Tensor | None,
    residual_TO: Tensor | None,
    row_scale_O: Tensor | None = None,
    token_scale_T: Tensor | None = None,
    *,
    split: Split | None,
    after: bool,
) -> Tensor:
    device = x_TI.device
    split = split or choose(product)
    y = torch.empty(product.n_tokens, product.n_out, dtype=product.dtype, device=device)
    per_block = product.strips_per_block(split)
    shape = _Shape(
        x_TI.data_ptr(),
        product.n_tokens,
        product.row_bytes,
        product.n_out,
        product.strips,
        product.chunks,
        product.quantum,
        product.part_chunks(split.splits * split.warp_splits),
        per_block,
    )
    workspace = arrived = None
    if split.splits > 1 and not has_clusters():
        n = split.columns * split.splits * per_block * STRIP * product.tiles * _TILE
        workspace, arrived = torch.empty(n, dtype=torch.int32, device=device), _counters(device)
    pointers = (y, bias_O, residual_TO, row_scale_O, token_scale_T, workspace, arrived)
    out = _Output(*(None if tensor is None else tensor.data_ptr() for tensor in pointers))
    defines = (
        ("DTYPE", 16 if product.dtype == torch.float16 else 0),
        *product.defines,
        ("TILES", product.tiles),
        ("N_WARPS", split.warps),
        ("WARP_SPLITS", split.warp_splits),
        ("BLOCK_SPLITS", split.splits),
        ("RING", split.ring),
    )
    kernel(product.file, product.file.removesuffix(".cu"), defines).launch(
        (split.columns * split.splits,),
        split.warps * 32,
        (shape, out, *weight),
        stream(),
        shared_bytes=product.shared_bytes(split),
        after=after,
        cluster=split.splits if has_clusters() else 1,
    )
    return y


def choose(product: _Product) -> Split:
    """Return how a product is divided on the current device."""
    columns = n_processors()
    return Split(warps=8, warp_splits=4, splits=1, columns=columns, ring=3)


def has_clusters() -> bool:
    """Say whether blocks of the current device can write to each other's shared memory."""
    return architecture() == "sm_90a"


@cache
def _counters(device: torch.device) -> Tensor:
    return torch.zeros(4096, dtype=torch.int32, device=device)


VARIANTS = tuple(
    Variant(file, (("DTYPE", dtype), define, ("TILES", tiles), ("N_WARPS", 8), ("WARP_SPLITS", 2), ("BLOCK_SPLITS", 2), ("RING", 3)))
    for file, define in (
        *(("stream_int4.cu", ("GROUP", group)) for group in (0, *GROUPS)),
        *(("stream_rows.cu", ("FORMAT", form)) for form in (_PLAIN, _INT8, _FP8)),
    )
    for dtype in (0, 16)
    for tiles in (1, 2, 4, 8)
)
