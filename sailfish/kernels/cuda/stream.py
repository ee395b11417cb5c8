"""Multiplies few tokens with streamed weights in bfloat16, INT8, FP8 and INT4: checks and launches."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from sailfish.base.errors import EngineError
from sailfish.kernels.contract import Quantised, SumNorm, Weight8
from sailfish.kernels.cuda import program
from sailfish.kernels.cuda.linear_limits import NORM_INPUTS, NORM_WIDTH
from sailfish.kernels.cuda.program import Defines, Variant
from sailfish.kernels.cuda.stream_split import CHUNK_BYTES, INT4_CHUNKS, Card, Product, Split, choose, parts
from sailfish.kernels.int4 import GROUPS, STRIP, UNIT, Int4Weight

MAX_TOKENS = 16
MOST_COLUMNS = 1 << 14
"""Columns of blocks that may have to add up: half of 512 multiprocessors times 64."""
_PLAIN, _INT8, _FP8 = 0, 1, 2
_ACTIVATIONS = {None: 0, "silu": 1, "gelu_tanh": 2}
_DTYPES = (torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)


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


class _Norm(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("residual", "weight", "sum")),
        ("eps", ctypes.c_float),
        ("shift", ctypes.c_float),
    )


class _Output(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("y", "bias", "residual", "row_scale", "token_scale", "workspace", "arrived")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operands:
    """What a product takes beside activations and weight."""

    bias_O: Tensor | None = None
    residual_TO: Tensor | None = None
    row_scale_O: Tensor | None = None
    token_scale_T: Tensor | None = None
    norm: SumNorm | None = None
    sum_TD: Tensor | None = None
    """Where x + residual goes."""

    def rows(self, rows: slice) -> _Operands:
        """Return those of a part of the tokens."""
        residual_TO, scale_T = (x if x is None else x[rows] for x in (self.residual_TO, self.token_scale_T))
        return replace(self, residual_TO=residual_TO, token_scale_T=scale_T)


def linear_int4(
    x_TI: Tensor,
    weight: Int4Weight,
    bias_O: Tensor | None = None,
    residual_TO: Tensor | None = None,
    *,
    activation: str | None = None,
    split: Split | None = None,
    after: bool = True,
) -> Tensor:
    """Return x @ weight.T + bias (+ residual), x in the dtype of the scales.

    With an activation, "silu" or "gelu_tanh": activation(gate) * up of it, [T, O / 2], for weights whose
    outputs alternate by eights of gate and up, rounded as the ops one by one do. Made for at most MAX_TOKENS
    tokens; more are multiplied in passes, each of which reads the weight. `split` overrides how the work is
    divided, `after` says whether the launch may begin early.
    """
    _refuse(rejects(x_TI, weight))
    operands = _Operands(bias_O=bias_O, residual_TO=residual_TO)
    return _run(_int4(x_TI, weight, activation), x_TI, _planes(weight), operands, split, after)


def linear_bf16(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    residual_TO: Tensor | None = None,
    *,
    activation: str | None = None,
    split: Split | None = None,
    after: bool = True,
) -> Tensor:
    """Return x @ weight.T + bias (+ residual), both in bfloat16 or both in float16; see linear_int4."""
    _refuse(rejects(x_TI, weight_OI))
    product = _rows(_PLAIN, x_TI, weight_OI, x_TI.dtype, activation)
    operands = _Operands(bias_O=bias_O, residual_TO=residual_TO)
    return _run(product, x_TI, (weight_OI,), operands, split, after)


def linear_8(
    x: Quantised,
    weight: Weight8,
    bias_O: Tensor | None = None,
    residual_TO: Tensor | None = None,
    *,
    activation: str | None = None,
    split: Split | None = None,
    after: bool = True,
) -> Tensor:
    """Return scale_x * scale_weight * (x @ weight.T) + bias (+ residual), int8 or fp8; see linear_int4."""
    values_TI, values_OI = x.values_TI, weight.values_OI
    _refuse(rejects(values_TI, values_OI))
    form = _INT8 if weight.format == "int8" else _FP8
    operands = _Operands(
        bias_O=bias_O, residual_TO=residual_TO, row_scale_O=weight.scale_O, token_scale_T=x.scale_T
    )
    product = _rows(form, values_TI, values_OI, x.dtype, activation)
    return _run(product, values_TI, (values_OI,), operands, split, after)


def norm_linear_int4(
    delta_TD: Tensor,
    norm: SumNorm,
    weight: Int4Weight,
    bias_O: Tensor | None = None,
    *,
    activation: str | None = None,
    split: Split | None = None,
    after: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return linear_int4 of rms_norm(delta + residual), and that sum, in one launch.

    Rounded as the ops one by one do, up to the order in which squares are added. For what `rejects_norm`
    lets pass: every block makes the norm, so tokens must be few.
    """
    _refuse(rejects(delta_TD, weight) or rejects_norm(delta_TD, norm))
    product = replace(_int4(delta_TD, weight, activation), has_norm=True)
    return _run_norm(product, delta_TD, norm, _planes(weight), bias_O, split, after)


def norm_linear_bf16(
    delta_TD: Tensor,
    norm: SumNorm,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    activation: str | None = None,
    split: Split | None = None,
    after: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return linear_bf16 of rms_norm(delta + residual), and that sum, in one launch; see norm_linear_int4."""
    _refuse(rejects(delta_TD, weight_OI) or rejects_norm(delta_TD, norm))
    product = replace(_rows(_PLAIN, delta_TD, weight_OI, delta_TD.dtype, activation), has_norm=True)
    return _run_norm(product, delta_TD, norm, (weight_OI,), bias_O, split, after)


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


def rejects_norm(delta_TD: Tensor, norm: SumNorm) -> str | None:
    """Say why a norm cannot be the prologue of a streamed product, or return None."""
    n_tokens, width = delta_TD.shape
    if width % NORM_WIDTH:
        return f"a norm of {width} is no multiple of {NORM_WIDTH}"
    if n_tokens * width > NORM_INPUTS:
        return f"norms of {n_tokens} tokens of {width} do not fit into registers"
    if not delta_TD.dtype == norm.residual_TD.dtype == norm.weight_D.dtype:
        return f"{delta_TD.dtype}, {norm.residual_TD.dtype} and {norm.weight_D.dtype} are mixed"
    return None


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise EngineError(f"cannot stream this weight: {reason}")


def _int4(x_TI: Tensor, weight: Int4Weight, activation: str | None) -> Product:
    group = weight.group if weight.group in GROUPS else 0
    span = group or UNIT
    return Product(
        file="stream_int4.cu",
        defines=(("GROUP", group),),
        dtype=x_TI.dtype,
        n_tokens=x_TI.shape[0],
        row_bytes=x_TI.shape[1] * 2,
        n_out=weight.n_out,
        plane_bytes=INT4_CHUNKS * UNIT // group * STRIP * 2 if group else 0,
        chunks=weight.packed.shape[1],
        span=span,
        quantum=max(1, span // UNIT),
        activation=activation,
    )


def _planes(weight: Int4Weight) -> tuple[Tensor | None, ...]:
    return weight.packed, weight.scale, weight.zero


def _rows(form: int, x_TI: Tensor, weight_OI: Tensor, dtype: torch.dtype, activation: str | None) -> Product:
    row_bytes = x_TI.shape[1] * x_TI.element_size()
    return Product(
        file="stream_rows.cu",
        defines=(("FORMAT", form),),
        dtype=dtype,
        n_tokens=x_TI.shape[0],
        row_bytes=row_bytes,
        n_out=weight_OI.shape[0],
        chunks=parts(row_bytes, CHUNK_BYTES),
        activation=activation,
        is_8_bit=form != _PLAIN,
    )


def _run(
    product: Product,
    x_TI: Tensor,
    weight: tuple[Tensor | None, ...],
    operands: _Operands,
    split: Split | None,
    after: bool,
) -> Tensor:
    x_TI = x_TI.contiguous()
    n_stored = product.n_out
    if product.activation is not None:
        assert n_stored % STRIP == 0 and operands.residual_TO is None, "gates and ups take turns in strips"
        n_stored //= 2
    y_TO = torch.empty(product.n_tokens, n_stored, dtype=product.dtype, device=x_TI.device)
    if product.n_tokens <= MAX_TOKENS:
        if product.n_tokens:
            _launch(product, x_TI, weight, y_TO, operands, split, after)
        return y_TO
    for start in range(0, product.n_tokens, MAX_TOKENS):
        rows = slice(start, start + MAX_TOKENS)
        part = replace(product, n_tokens=len(x_TI[rows]))
        _launch(part, x_TI[rows], weight, y_TO[rows], operands.rows(rows), split, after)
    return y_TO


def _run_norm(
    product: Product,
    delta_TD: Tensor,
    norm: SumNorm,
    weight: tuple[Tensor | None, ...],
    bias_O: Tensor | None,
    split: Split | None,
    after: bool,
) -> tuple[Tensor, Tensor]:
    norm = replace(norm, residual_TD=norm.residual_TD.contiguous())
    sum_TD = torch.empty(delta_TD.shape, dtype=delta_TD.dtype, device=delta_TD.device)
    operands = _Operands(bias_O=bias_O, norm=norm, sum_TD=sum_TD)
    return _run(product, delta_TD, weight, operands, split, after), sum_TD


def _launch(
    product: Product,
    x_TI: Tensor,
    weight: tuple[Tensor | None, ...],
    y_TO: Tensor,
    operands: _Operands,
    split: Split | None,
    after: bool,
) -> None:
    card = this_card()
    split = split or choose(product.in_bucket, card)
    shared_bytes = product.shared_bytes(split, card.clusters)
    if card.clusters and split.blocks == 1:
        # A processor that is free early would take two blocks of the next product, and keep all waiting.
        shared_bytes = max(shared_bytes, card.half_bytes + 1)
    shape = _Shape(
        x_TI.data_ptr(),
        product.n_tokens,
        product.row_bytes,
        product.n_out,
        product.strips,
        product.chunks,
        product.quantum,
        product.block_chunks(split),
        product.strips_per_block(split),
    )
    workspace = arrived = None
    if split.splits > 1 and not card.clusters:
        assert split.columns <= MOST_COLUMNS, "more than there are counters"
        n_bytes = product.partial_bytes(split)
        workspace = torch.empty(n_bytes, dtype=torch.uint8, device=x_TI.device)
        arrived = _counters(x_TI.device)
    scales = (operands.row_scale_O, operands.token_scale_T)
    pointers = (y_TO, operands.bias_O, operands.residual_TO, *scales, workspace, arrived)
    program.kernel(product.file, product.file.removesuffix(".cu"), _defines(product, split)).launch(
        (split.columns * split.splits,),
        split.warps * 32 + 32,
        (shape, _norm(operands), _Output(*map(_pointer, pointers)), *weight),
        program.stream(),
        shared_bytes=shared_bytes,
        after=after,
        cluster=split.splits if card.clusters else 1,
    )


def _norm(operands: _Operands) -> _Norm:
    norm = operands.norm
    if norm is None:
        return _Norm()
    pointers = map(_pointer, (norm.residual_TD, norm.weight_D, operands.sum_TD))
    return _Norm(*pointers, norm.eps, float(norm.plus_one))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


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
    return torch.zeros(MOST_COLUMNS, dtype=torch.int32, device=device)


def _defines(product: Product, split: Split) -> Defines:
    return (
        ("DTYPE", 16 if product.dtype == torch.float16 else 0),
        *product.defines,
        ("TILES", product.tiles),
        ("STRIP_WARPS", split.strip_warps),
        ("CHUNK_WARPS", split.chunk_warps),
        ("BLOCK_SPLITS", split.splits),
        ("RING", split.ring),
        ("BLOCKS_PER_PROCESSOR", split.blocks),
        ("ACTIVATION", _ACTIVATIONS[product.activation]),
        ("NORM", product.norm_groups(split)),
    )


def _variants() -> Iterator[Variant]:
    readers = (
        *(("stream_int4.cu", ("GROUP", group)) for group in (0, *GROUPS)),
        *(("stream_rows.cu", ("FORMAT", form)) for form in (_PLAIN, _INT8, _FP8)),
    )
    narrow = Split(strip_warps=1, chunk_warps=8, splits=1, columns=1, ring=4)
    pair = Split(strip_warps=2, chunk_warps=4, splits=2, columns=1, ring=4, blocks=2)
    slim = Split(strip_warps=1, chunk_warps=4, splits=2, columns=1, ring=4, blocks=2)
    broad = Split(strip_warps=2, chunk_warps=8, splits=1, columns=1, ring=3)
    wide = Split(strip_warps=4, chunk_warps=2, splits=2, columns=1, ring=3)
    alone = Split(strip_warps=8, chunk_warps=1, splits=1, columns=1, ring=3)
    for file, define in readers:
        product = Product(
            file=file,
            defines=(define,),
            dtype=torch.bfloat16,
            n_tokens=1,
            row_bytes=8192,
            n_out=STRIP,
            chunks=64,
        )
        many = replace(product, n_tokens=MAX_TOKENS)
        for dtype, each, split in itertools.product(
            (torch.bfloat16, torch.float16), (product, many), (narrow, wide)
        ):
            yield Variant(file, _defines(replace(each, dtype=dtype), split))
        yield Variant(file, _defines(replace(product, activation="silu"), pair))
        yield Variant(file, _defines(replace(many, activation="gelu_tanh"), wide))
        if define in (("FORMAT", _INT8), ("FORMAT", _FP8)):
            yield Variant(file, _defines(product, slim))
        if define in (("GROUP", 32), ("GROUP", 128), ("FORMAT", _PLAIN)):
            yield Variant(file, _defines(replace(product, activation="silu"), alone))
            yield Variant(file, _defines(replace(product, has_norm=True), broad))
            for n_tokens in (1, 4):
                normed = replace(product, n_tokens=n_tokens, activation="silu", has_norm=True)
                yield Variant(file, _defines(normed, pair))


VARIANTS = tuple(_variants())
"""The ways that differ most; ring depths and the rest change little but the layout of shared memory."""
