"""Multiplies many tokens with a 4-bit weight on the tensor cores: tile shapes, checks and launches."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.kernels.cuda import program, tensormap
from sailfish.kernels.cuda.program import Defines, Variant
from sailfish.kernels.int4 import STRIP, UNIT, Int4Weight

_FILE, _MMA_FILE = "wide.cu", "wide_mma.cu"
_ENTRY = "wide_linear_int4"
_SHARED_BYTES = 227 << 10
_MMA_TOKENS = (32, 64, 128)
_MMA_ROWS = 128
_MMA_SLOTS = 4
_MMA_THREADS = 256
_MMA_SPLIT_TILES = 1024
_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Shape:
    """How the Hopper kernel cuts the result into tiles."""

    tokens: int
    """Tokens of a tile."""
    groups: int
    """Warpgroups of a block that multiply."""
    tiles: int
    """64-row tiles of each."""
    peers: int = 1
    """Blocks of a cluster that share their tokens."""

    @property
    def rows(self) -> int:
        """Return the outputs of a block's tile."""
        return 64 * self.groups * self.tiles

    @property
    def threads(self) -> int:
        """Return the threads of a block, the producers' warpgroup included."""
        return 128 * (self.groups + 1)

    @property
    def chunk(self) -> int:
        """Return the tokens that are stored at once."""
        return 32 if self.tokens < 64 or self.groups > 2 else 64

    @property
    def slots(self) -> int:
        """Return the slots of 64 inputs that fit in shared memory."""
        slot = self.tokens * UNIT * 2 + self.rows // STRIP * (512 + 2 * 64) + 16
        return min(12, (_SHARED_BYTES - self.groups * self.chunk * 256 - 1024) // slot)

    def defines(self, scales: int, zeros: bool, dtype: torch.dtype) -> Defines:
        """Return what the source is compiled with for weights of one kind.

        scales: groups in 64 inputs, or 1 where a group is longer. zeros: whether there are zero points.
        """
        return (
            ("TOKENS", self.tokens),
            ("GROUPS", self.groups),
            ("TILES", self.tiles),
            ("SLOTS", self.slots),
            ("PEERS", self.peers),
            ("SCALES", scales),
            ("ZEROS", int(zeros)),
            *_kind(dtype),
        )


SHAPES = (
    Shape(32, 2, 2),
    Shape(64, 2, 1),
    Shape(64, 2, 2),
    Shape(64, 4, 1),
    Shape(64, 2, 2, 2),
    Shape(128, 2, 1),
    Shape(128, 2, 2),
    Shape(128, 3, 1),
    Shape(128, 4, 1),
    Shape(128, 2, 2, 2),
    Shape(256, 2, 1),
    Shape(256, 2, 1, 2),
)


class _Problem(ctypes.Structure):
    _fields_ = (
        ("bias", ctypes.c_void_p),
        ("n_out", ctypes.c_int),
        ("n_pairs", ctypes.c_int),
        ("token_tiles", ctypes.c_int),
        ("row_tiles", ctypes.c_int),
        ("units_per_group", ctypes.c_int),
    )


class _MmaProblem(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("part", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
        ("n_tokens", ctypes.c_int),
        ("n_in", ctypes.c_int),
        ("x_stride", ctypes.c_int),
        ("n_out", ctypes.c_int),
        ("y_stride", ctypes.c_int),
        ("strips", ctypes.c_int),
        ("units", ctypes.c_int),
        ("n_groups", ctypes.c_int),
        ("group", ctypes.c_int),
        ("splits", ctypes.c_int),
    )


def linear_int4(x_TI: Tensor, weight: Int4Weight, bias_O: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias, [T, O] in x's dtype, which is the scales'."""
    x_TI = _aligned(x_TI)
    # Rows of whole 16 bytes, which the copies want; the few weights that have others pay a copy.
    y_TO = x_TI.new_empty(x_TI.shape[0], _up(weight.n_out, 8))
    if x_TI.shape[0] == 0:
        pass
    elif program.architecture() == "sm_90a":
        shape, splits = choose(x_TI.shape[0], weight.n_out, weight.n_in)
        launch(x_TI, weight, bias_O, y_TO, shape, splits)
    else:
        launch_mma(x_TI, weight, bias_O, y_TO)
    return y_TO if y_TO.shape[1] == weight.n_out else y_TO[:, : weight.n_out].contiguous()


def choose(n_tokens: int, n_out: int, n_in: int) -> tuple[Shape, int]:
    """Return the tile shape for a product, and how many blocks share a tile's inputs."""
    return SHAPES[2], 1


def launch(
    x_TI: Tensor, weight: Int4Weight, bias_O: Tensor | None, y_TO: Tensor, shape: Shape, splits: int
) -> None:
    """Run the Hopper kernel with one tile shape, each tile's inputs split among `splits` blocks.

    The rows of x and y begin at multiples of 16 bytes.
    """
    token_tiles = -(-x_TI.shape[0] // shape.tokens)
    row_tiles = -(-weight.n_out // (shape.rows * shape.peers))
    units = weight.packed.shape[1]
    pairs = -(-units // 2)
    splits = min(splits, pairs)
    cluster = shape.peers * splits
    n_tiles = token_tiles * row_tiles
    n_clusters = n_tiles if splits > 1 else min(n_tiles, program.n_processors() // cluster)
    # A row's one group lasts as long as the pairs of units, which may be one unit longer than the row.
    units_per_group = 2 * pairs if weight.scale.shape[1] == 1 else max(weight.group // UNIT, 1)
    scales = 2 if weight.group == UNIT // 2 else 1
    entry = program.kernel(_FILE, _ENTRY, shape.defines(scales, weight.zero is not None, x_TI.dtype))
    entry.launch(
        (n_clusters * cluster,),
        shape.threads,
        (
            _maps(x_TI, weight, y_TO, shape, scales, shape.chunk if splits == 1 else 8),
            _Problem(_pointer(bias_O), weight.n_out, pairs, token_tiles, row_tiles, units_per_group),
        ),
        program.stream(),
        shared_bytes=_SHARED_BYTES,
        after=True,
        cluster=cluster,
    )


def launch_mma(x_TI: Tensor, weight: Int4Weight, bias_O: Tensor | None, y_TO: Tensor) -> None:
    """Run the kernel for GPUs before Hopper. The rows of x and y begin at multiples of 16 bytes."""
    n_tokens = x_TI.shape[0]
    strips, units = weight.packed.shape[:2]
    tokens = next((tokens for tokens in _MMA_TOKENS if tokens >= n_tokens), _MMA_TOKENS[-1])
    n_tiles = -(-n_tokens // tokens) * -(-weight.n_out // _MMA_ROWS)
    splits = max(1, min(program.n_processors() // n_tiles, units // (2 * _MMA_SLOTS)))
    n_parts = 0 if splits == 1 else n_tiles * splits * tokens * _MMA_ROWS
    part = torch.empty(n_parts, dtype=torch.float32, device=x_TI.device)
    problem = _MmaProblem(
        _pointer(x_TI),
        _pointer(weight.packed),
        _pointer(weight.scale),
        _pointer(weight.zero),
        _pointer(bias_O),
        _pointer(y_TO),
        _pointer(part),
        _pointer(_arrived(x_TI.device, program.stream())),
        n_tokens,
        x_TI.shape[1],
        x_TI.stride(0),
        weight.n_out,
        y_TO.shape[1],
        strips,
        units,
        weight.scale.shape[1],
        weight.group,
        splits,
    )
    defines = (("TOKENS", tokens), ("SLOTS", _MMA_SLOTS), *_kind(x_TI.dtype))
    slot_bytes = tokens * UNIT * 2 + _MMA_ROWS // STRIP * (512 + 2 * 64)
    program.kernel(_MMA_FILE, _ENTRY, defines).launch(
        (n_tiles, splits), _MMA_THREADS, (problem,), program.stream(), shared_bytes=_MMA_SLOTS * slot_bytes
    )


@cache
def _arrived(device: torch.device, stream: int) -> Tensor:
    """Return counters that are zero between launches; launches of one stream follow each other."""
    return torch.zeros(_MMA_SPLIT_TILES, dtype=torch.int32, device=device)


def _maps(
    x_TI: Tensor, weight: Int4Weight, y_TO: Tensor, shape: Shape, scales: int, stored_tokens: int
) -> ctypes.Array[ctypes.c_ubyte]:
    strips = shape.rows // STRIP
    scale, zero = (
        _map(planes, STRIP * planes.shape[1], (strips, STRIP * scales))
        for planes in (weight.scale, weight.scale if weight.zero is None else weight.zero)
    )
    return tensormap.argument(
        _map(x_TI, x_TI.shape[1], (shape.tokens // shape.peers, UNIT), swizzled=True),
        _map(weight.packed, weight.packed.shape[1] * 128, (strips, 128)),
        scale,
        zero,
        _map(y_TO, y_TO.shape[1], (stored_tokens, 64), swizzled=True),
    )


def _map(x: Tensor, columns: int, box: tuple[int, int], swizzled: bool = False) -> bytes:
    dtype, row_bytes = str(x.dtype).removeprefix("torch."), x.stride(0) * x.element_size()
    return tensormap.matrix(x.data_ptr(), dtype, x.shape[0], columns, row_bytes, box, swizzled)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _aligned(x_TI: Tensor) -> Tensor:
    """Return x with rows that begin at multiples of 16 bytes, padded with zeros where they must be."""
    if x_TI.stride(1) == 1 and x_TI.stride(0) % 8 == 0 and x_TI.data_ptr() % 16 == 0:
        return x_TI
    width = x_TI.shape[1]
    return F.pad(x_TI, (0, _up(width, 8) - width)).contiguous()


def _kind(dtype: torch.dtype) -> Defines:
    return (("F16", 1),) if dtype == torch.float16 else ()


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


VARIANTS = tuple(
    Variant(_FILE, shape.defines(*kind), only=("sm_90a",))
    for shape, kind in product(SHAPES, product((1, 2), (False, True), _DTYPES))
) + tuple(
    Variant(
        _MMA_FILE,
        (("TOKENS", tokens), ("SLOTS", _MMA_SLOTS), *_kind(dtype)),
        only=("sm_80", "sm_86", "sm_89"),
    )
    for tokens, dtype in product(_MMA_TOKENS, _DTYPES)
)
"""Every way the sources are compiled."""
