"""Multiplies many tokens with a 4-bit weight on the tensor cores: checks, tile shapes and launches."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.base.errors import EngineError
from sailfish.kernels.cuda import program, tensormap
from sailfish.kernels.cuda.program import Defines, Variant
from sailfish.kernels.int4 import STRIP, UNIT, Int4Weight

_FILE = "wide.cu"
_MMA_FILE = "wide_mma.cu"
_MMA_TOKENS = (32, 64, 128)
_MMA_ROWS = 128
_MMA_SLOTS = 4
_MMA_THREADS = 256
_THREADS = 384
_SHARED_BYTES = 227 << 10
_STAGED_BYTES = 2 * 16384
_CHUNK = 64
_MAX_SPLIT_TILES = 1024
_ROW = UNIT * 2
_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Shape:
    """How the Hopper kernel cuts the result into tiles."""

    tokens: int
    """Tokens of a tile."""
    tiles: int
    """64-row tiles of each of a block's two consumers."""
    peers: int = 1
    """Blocks of a cluster that share their tokens."""

    @property
    def rows(self) -> int:
        """Return the outputs of a block's tile."""
        return 128 * self.tiles

    @property
    def slots(self) -> int:
        """Return the slots of 64 inputs that fit in shared memory."""
        slot = self.tokens * _ROW + self.rows // STRIP * (512 + 2 * 64) + 16
        return min(12, (_SHARED_BYTES - _STAGED_BYTES - 1024) // slot)

    @property
    def defines(self) -> Defines:
        """Return what the source is compiled with."""
        return (
            ("TOKENS", self.tokens),
            ("TILES", self.tiles),
            ("SLOTS", self.slots),
            ("PEERS", self.peers),
        )


SHAPES = (
    Shape(32, 2),
    Shape(64, 2),
    Shape(128, 2),
    Shape(256, 1),
    Shape(128, 1),
    Shape(256, 1, 2),
    Shape(128, 2, 2),
    Shape(64, 1),
    Shape(64, 2, 2),
)
VARIANTS = tuple(
    Variant(_FILE, (*shape.defines, *kind), only=("sm_90a",))
    for shape in SHAPES
    for kind in ((), (("F16", 1),))
) + tuple(
    Variant(_MMA_FILE, (("TOKENS", tokens), ("SLOTS", 4), *kind), only=("sm_80", "sm_86", "sm_89"))
    for tokens in _MMA_TOKENS
    for kind in ((), (("F16", 1),))
)


class _Problem(ctypes.Structure):
    _fields_ = (
        ("bias", ctypes.c_void_p),
        *(
            (name, ctypes.c_int)
            for name in (
                "n_out",
                "n_pairs",
                "token_tiles",
                "row_tiles",
                "units_per_group",
                "groups_per_unit",
                "has_zero",
            )
        ),
    )


def linear_int4(x_TI: Tensor, weight: Int4Weight, bias_O: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias, [T, O] in x's dtype, which is the scales'."""
    if program.architecture() != "sm_90a":
        return launch_mma(x_TI, weight, bias_O)
    shape, splits = choose(x_TI.shape[0], weight.n_out, weight.n_in)
    return launch(x_TI, weight, bias_O, shape, splits)


def choose(n_tokens: int, n_out: int, n_in: int) -> tuple[Shape, int]:
    return SHAPES[2], 1


def launch(x_TI: Tensor, weight: Int4Weight, bias_O: Tensor | None, shape: Shape, splits: int) -> Tensor:
    """Run the Hopper kernel with one tile shape, each tile's inputs split among `splits` blocks."""
    n_tokens, n_out = x_TI.shape[0], weight.n_out
    width = _up(n_out, 8)
    y_TO = torch.empty(n_tokens, width, dtype=x_TI.dtype, device=x_TI.device)
    if n_tokens:
        x_TI = _aligned(x_TI)
        strips, units = weight.packed.shape[:2]
        token_tiles = -(-n_tokens // shape.tokens)
        row_tiles = -(-n_out // (shape.rows * shape.peers))
        n_tiles = token_tiles * row_tiles
        pairs = -(-units // 2)
        splits = min(splits, pairs)
        cluster = shape.peers * splits
        n_clusters = n_tiles if splits > 1 else min(n_tiles, program.n_processors() // cluster)
        kind = (("F16", 1),) if x_TI.dtype == torch.float16 else ()
        entry = program.kernel(_FILE, "wide_linear_int4", (*shape.defines, *kind))
        group = 0 if weight.group == units * UNIT else weight.group
        problem = _Problem(
            None if bias_O is None else bias_O.data_ptr(),
            n_out,
            pairs,
            token_tiles,
            row_tiles,
            max(weight.group // UNIT, 1) if group else 2 * units,
            2 if group == 32 else 1,
            weight.zero is not None,
        )
        entry.launch(
            (n_clusters * cluster,),
            _THREADS,
            (_maps(x_TI, weight, y_TO, shape, splits), problem),
            program.stream(),
            shared_bytes=_SHARED_BYTES,
            after=True,
            cluster=cluster,
        )
    return y_TO if width == n_out else y_TO[:, :n_out].contiguous()


class _MmaProblem(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "packed", "scale", "zero", "bias", "y", "part", "arrived")
        ),
        *(
            (name, ctypes.c_int)
            for name in (
                "n_tokens",
                "n_in",
                "x_stride",
                "n_out",
                "y_stride",
                "strips",
                "units",
                "n_groups",
                "group",
                "splits",
            )
        ),
    )


def launch_mma(x_TI: Tensor, weight: Int4Weight, bias_O: Tensor | None) -> Tensor:
    """Run the kernel for GPUs before Hopper."""
    n_tokens, n_out = x_TI.shape[0], weight.n_out
    width = _up(n_out, 8)
    y_TO = torch.empty(n_tokens, width, dtype=x_TI.dtype, device=x_TI.device)
    if n_tokens:
        x_TI = _aligned(x_TI)
        strips, units = weight.packed.shape[:2]
        tokens = next((tokens for tokens in _MMA_TOKENS if tokens >= n_tokens), _MMA_TOKENS[-1])
        n_tiles = -(-n_tokens // tokens) * -(-n_out // _MMA_ROWS)
        splits = max(1, min(program.n_processors() // n_tiles, units // (2 * _MMA_SLOTS)))
        part = torch.empty(n_tiles * splits * tokens * _MMA_ROWS, dtype=torch.float32, device=x_TI.device)
        problem = _MmaProblem(
            x_TI.data_ptr(),
            weight.packed.data_ptr(),
            weight.scale.data_ptr(),
            None if weight.zero is None else weight.zero.data_ptr(),
            None if bias_O is None else bias_O.data_ptr(),
            y_TO.data_ptr(),
            part.data_ptr(),
            _arrived(x_TI.device, program.stream()).data_ptr(),
            n_tokens,
            x_TI.shape[1],
            x_TI.stride(0),
            n_out,
            width,
            strips,
            units,
            weight.scale.shape[1],
            weight.group,
            splits,
        )
        kind = (("F16", 1),) if x_TI.dtype == torch.float16 else ()
        entry = program.kernel(
            _MMA_FILE, "wide_linear_int4", (("TOKENS", tokens), ("SLOTS", _MMA_SLOTS), *kind)
        )
        entry.launch(
            (n_tiles, splits),
            _MMA_THREADS,
            (problem,),
            program.stream(),
            shared_bytes=_MMA_SLOTS * (tokens * _ROW + _MMA_ROWS // STRIP * (512 + 2 * 64)),
        )
    return y_TO if width == n_out else y_TO[:, :n_out].contiguous()


@cache
def _arrived(device: torch.device, stream: int) -> Tensor:
    """Return counters that are zero between launches; launches of one stream follow each other."""
    return torch.zeros(_MAX_SPLIT_TILES, dtype=torch.int32, device=device)


def _maps(
    x_TI: Tensor, weight: Int4Weight, y_TO: Tensor, shape: Shape, splits: int
) -> ctypes.Array[ctypes.c_ubyte]:
    strips = shape.rows // STRIP
    units, groups = weight.packed.shape[1], weight.scale.shape[1]
    columns = STRIP * (2 if weight.group == 32 and groups > 1 else 1)
    scale, zero = (
        _map(planes, planes.shape[0], groups * STRIP, (strips, columns))
        for planes in (weight.scale, weight.scale if weight.zero is None else weight.zero)
    )
    return tensormap.argument(
        _map(x_TI, x_TI.shape[0], x_TI.shape[1], (shape.tokens // shape.peers, UNIT), swizzled=True),
        _map(weight.packed, weight.packed.shape[0], units * 128, (strips, 128)),
        scale,
        zero,
        _map(
            y_TO,
            y_TO.shape[0],
            y_TO.shape[1],
            (8 if splits > 1 else min(shape.tokens, _CHUNK), 64),
            swizzled=True,
        ),
    )


def _map(x: Tensor, rows: int, columns: int, box: tuple[int, int], swizzled: bool = False) -> bytes:
    dtype = str(x.dtype).removeprefix("torch.")
    return tensormap.matrix(x.data_ptr(), dtype, rows, columns, x.stride(0) * x.element_size(), box, swizzled)


def _aligned(x_TI: Tensor) -> Tensor:
    """Return x with rows that begin at multiples of 16 bytes, for the bulk copy engine."""
    width = x_TI.shape[1]
    if x_TI.stride(1) == 1 and x_TI.stride(0) % 8 == 0 and x_TI.data_ptr() % 16 == 0:
        return x_TI
    return F.pad(x_TI, (0, _up(width, 8) - width)).contiguous()


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
