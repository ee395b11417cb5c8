"""Multiplies many tokens with a 4-bit weight on the tensor cores: tile shapes, checks and launches."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.kernels.cuda import program, tensormap
from sailfish.kernels.cuda.program import Defines, Variant
from sailfish.kernels.int4 import ROWS, STRIP, UNIT, Int4Weight

_FILE, _MMA_FILE = "wide.cu", "wide_mma.cu"
_ENTRY = "wide_linear_int4"
_SHARED_BYTES = {1: 227 << 10, 2: 113 << 10}
"""Shared memory of a block, by blocks on a multiprocessor."""
_MMA_TOKENS = (32, 64, 128)
_MMA_ROWS = 128
_MMA_SLOTS = 4
_MMA_THREADS = 256
_MMA_SPLIT_TILES = 1024
_DTYPES = (torch.bfloat16, torch.float16)
ACTIVATIONS = {None: 0, "silu": 1, "gelu_tanh": 2}
"""As the epilogues of products number them."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How the Hopper kernel cuts the result into tiles."""

    tokens: int
    """Tokens of a tile."""
    groups: int
    """Warpgroups of a block that multiply, 64 rows each."""
    per_sm: int = 1
    """Blocks that fit on a multiprocessor."""

    @property
    def rows(self) -> int:
        """Return the outputs of a tile."""
        return ROWS * self.groups

    @property
    def threads(self) -> int:
        """Return the threads of a block, the producers' warpgroup included."""
        return 128 * (self.groups + 1)

    @property
    def chunk(self) -> int:
        """Return the tokens that are stored at once."""
        return 32 if self.tokens % 64 or self.groups > 2 or self.per_sm > 1 else 64

    @property
    def gated_chunk(self) -> int:
        """Return the tokens that are stored at once of half as many outputs, behind an activation."""
        return self.chunk if self.tokens % (2 * self.chunk) else 2 * self.chunk

    @property
    def slots(self) -> int:
        """Return the slots of 64 inputs that fit in shared memory."""
        slot = self.tokens * UNIT * 2 + self.rows // STRIP * (512 + 2 * 64) + 16
        return min(12, (_SHARED_BYTES[self.per_sm] - self.groups * self.chunk * 256 - 1024) // slot)

    def defines(self, scales: int, zeros: bool, dtype: torch.dtype) -> Defines:
        """Return what the source is compiled with for weights of one kind.

        scales: groups in 64 inputs, or 1 where a group is longer. zeros: whether there are zero points.
        """
        return (
            ("TOKENS", self.tokens),
            ("GROUPS", self.groups),
            ("SLOTS", self.slots),
            ("PER_SM", self.per_sm),
            ("SCALES", scales),
            ("ZEROS", int(zeros)),
            *_kind(dtype),
        )


STEP_US = {
    Shape(32, 2, per_sm=2): 0.160,
    Shape(64, 2): 0.222,
    Shape(64, 2, per_sm=2): 0.215,
    Shape(64, 4): 0.403,
    Shape(96, 2): 0.250,
    Shape(96, 3): 0.350,
    Shape(96, 4): 0.460,
    Shape(128, 2): 0.300,
    Shape(128, 3): 0.420,
    Shape(128, 4): 0.553,
    Shape(256, 2): 0.555,
}
"""The tile shapes there are, and what a block takes for 64 inputs where few others run, in us on an H200."""
SHAPES = tuple(STEP_US)
_START_US = 3.0
"""What a launch takes beside its steps."""
_PART_US, _SUM_US = 0.25, 0.9e-5
"""What it takes to add up a split tile, for each of its blocks and for each byte of their sums."""
_BUSY_FRAC = 0.2
"""How much longer a step takes where all multiprocessors run."""
_NARROW_FRAC = 0.35
"""What of a step's time does not depend on how many groups have rows."""
_LEAST_STEP_US = 0.155
"""What a step takes however little there is to multiply."""
_CLUSTERS = {1: (132, 66, 39, 30, 22, 17, 15, 15), 2: (264, 132, 79, 62, 47, 39, 32, 30)}
"""Clusters of 1, 2, ... 8 blocks that run at once on an H200's 132 multiprocessors, by blocks on each."""


class _Problem(ctypes.Structure):
    _fields_ = (
        ("bias", ctypes.c_void_p),
        ("n_out", ctypes.c_int),
        ("n_pairs", ctypes.c_int),
        ("token_tiles", ctypes.c_int),
        ("row_tiles", ctypes.c_int),
        ("narrow_tiles", ctypes.c_int),
        ("narrow_groups", ctypes.c_int),
        ("units_per_group", ctypes.c_int),
        ("activation", ctypes.c_int),
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
        ("activation", ctypes.c_int),
    )


def linear_int4(
    x_TI: Tensor, weight: Int4Weight, bias_O: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """Return x @ weight.T + bias, [T, O] in x's dtype, which is the scales'.

    With an activation, "silu" or "gelu_tanh": activation(gate) * up of it, [T, O / 2], for weights whose
    rows alternate by eights of gate and up. Each of gate, up and activation(gate) is rounded to the dtype.
    """
    assert x_TI.shape[1] == weight.n_in and x_TI.dtype == weight.scale.dtype
    assert activation is None or weight.n_out % STRIP == 0
    n_out = weight.n_out if activation is None else weight.n_out // 2
    x_TI = _aligned(x_TI)
    # Rows of whole 16 bytes, which the copies want; the few weights that have others pay a copy.
    y_TO = x_TI.new_empty(x_TI.shape[0], _up(n_out, 8))
    if x_TI.shape[0] == 0:
        pass
    elif program.architecture() == "sm_90a":
        shape, splits = choose(x_TI.shape[0], weight.n_out, weight.n_in, program.n_processors())
        launch(x_TI, weight, bias_O, y_TO, shape, splits, activation)
    else:
        launch_mma(x_TI, weight, bias_O, y_TO, activation)
    return y_TO if y_TO.shape[1] == n_out else y_TO[:, :n_out].contiguous()


@lru_cache(maxsize=4096)
def choose(n_tokens: int, n_out: int, n_in: int, n_processors: int) -> tuple[Shape, int]:
    """Return the tile shape for a product and how many blocks share a tile's inputs, by prediction."""
    fitting = [shape for shape in SHAPES if shape.tokens < 2 * max(n_tokens, 32)]
    splits = range(1, min(len(_CLUSTERS[1]), -(-n_in // (2 * UNIT))) + 1)
    return min(
        product(fitting, splits), key=lambda way: predict_us(n_tokens, n_out, n_in, n_processors, *way)
    )


def predict_us(n_tokens: int, n_out: int, n_in: int, n_processors: int, shape: Shape, splits: int) -> float:
    """Return what the Hopper kernel takes, in us: right to a tenth or so on an H200."""
    token_tiles = -(-n_tokens // shape.tokens)
    n_at_once = max(1, _CLUSTERS[shape.per_sm][splits - 1] * n_processors // 132)
    row_tiles, narrow_tiles, groups = cut_rows(shape, n_out, token_tiles, n_at_once if splits == 1 else 0)
    n_tiles = token_tiles * (row_tiles + narrow_tiles)
    n_waves = -(-n_tiles // n_at_once)
    if splits > 1 and n_waves > 1:
        return math.inf  # whole tiles balance as well, and need not be added up
    # Two blocks of a multiprocessor take turns: a wave that needs both takes twice as long. Clusters fill
    # some multiprocessors before they touch others.
    n_last = n_tiles - (n_waves - 1) * n_at_once
    n_turns = shape.per_sm if splits > 1 else -(-n_last // n_processors)
    step_us = STEP_US[shape]
    last_us = max(_LEAST_STEP_US, step_us * (_NARROW_FRAC + (1 - _NARROW_FRAC) * groups / shape.groups))
    steps_us = (n_waves - 1) * shape.per_sm * step_us + n_turns * last_us
    steps_us *= 1 + _BUSY_FRAC * min(1.0, n_tiles * splits / n_processors)
    part_us = 0.0 if splits == 1 else _PART_US + _SUM_US * shape.rows * shape.tokens * 4
    return _START_US + splits * part_us + steps_us * -(-n_in // (UNIT * splits))


def launch(
    x_TI: Tensor,
    weight: Int4Weight,
    bias_O: Tensor | None,
    y_TO: Tensor,
    shape: Shape,
    splits: int,
    activation: str | None = None,
) -> None:
    """Run the Hopper kernel with one tile shape, each tile's inputs split among `splits` blocks.

    The rows of x and y begin at multiples of 16 bytes.
    """
    token_tiles = -(-x_TI.shape[0] // shape.tokens)
    units = weight.packed.shape[1]
    pairs = -(-units // 2)
    splits = min(splits, pairs)
    n_at_once = program.n_processors() * shape.per_sm
    row_tiles, narrow_tiles, groups = cut_rows(
        shape, weight.n_out, token_tiles, n_at_once if splits == 1 else 0
    )
    n_tiles = token_tiles * (row_tiles + narrow_tiles)
    # A row's one group lasts as long as the pairs of units, which may be one unit longer than the row.
    units_per_group = 2 * pairs if weight.scale.shape[1] == 1 else max(weight.group // UNIT, 1)
    scales = 2 if weight.group == UNIT // 2 else 1
    problem = _Problem(
        _pointer(bias_O),
        weight.n_out,
        pairs,
        token_tiles,
        row_tiles,
        narrow_tiles,
        groups,
        units_per_group,
        ACTIVATIONS[activation],
    )
    stored_tokens = shape.chunk if activation is None else shape.gated_chunk
    stored = (stored_tokens if splits == 1 else 8, ROWS if activation is None else ROWS // 2)
    maps = _maps(x_TI, weight, y_TO, shape, scales, stored)
    program.kernel(_FILE, _ENTRY, shape.defines(scales, weight.zero is not None, x_TI.dtype)).launch(
        (n_tiles * splits if splits > 1 else min(n_tiles, n_at_once),),
        shape.threads,
        (maps, problem),
        program.stream(),
        shared_bytes=_SHARED_BYTES[shape.per_sm],
        after=True,
        cluster=splits,
    )


def cut_rows(shape: Shape, n_out: int, token_tiles: int, n_at_once: int) -> tuple[int, int, int]:
    """Return a product's whole row tiles, and how many narrow ones follow with rows for how many groups.

    Tiles run n_at_once at a time. Where the last of them would leave blocks idle, its rows are cut into
    tiles for fewer groups, which end the sooner. Tiles that are split (n_at_once 0) are never cut.
    """
    whole = -(-n_out // shape.rows)
    n_waves = -(-token_tiles * whole // n_at_once) if n_at_once else 0
    before = (n_waves - 1) * n_at_once // token_tiles
    for groups in range(1, shape.groups if n_at_once else 1):
        narrow = -(-(n_out - before * shape.rows) // (ROWS * groups))
        if token_tiles * (before + narrow) <= n_waves * n_at_once:
            return before, narrow, groups
    return whole, 0, shape.groups


def launch_mma(
    x_TI: Tensor, weight: Int4Weight, bias_O: Tensor | None, y_TO: Tensor, activation: str | None = None
) -> None:
    """Run the kernel for GPUs before Hopper. The rows of x and y begin at multiples of 16 bytes."""
    n_tokens = x_TI.shape[0]
    strips, units = weight.packed.shape[:2]
    tokens = next((tokens for tokens in _MMA_TOKENS if tokens >= n_tokens), _MMA_TOKENS[-1])
    n_tiles = -(-n_tokens // tokens) * -(-weight.n_out // _MMA_ROWS)
    splits = max(1, min(program.n_processors() // n_tiles, units // (2 * _MMA_SLOTS)))
    n_parts = 0 if splits == 1 else n_tiles * splits * tokens * _MMA_ROWS
    part = torch.empty(n_parts, dtype=torch.float32, device=x_TI.device)
    # What a graph's capture makes belongs to the graph, which zeroes it at each replay.
    counters = _new_counters if torch.cuda.is_current_stream_capturing() else _counters
    arrived = counters(x_TI.device, program.stream())
    problem = _MmaProblem(
        _pointer(x_TI),
        _pointer(weight.packed),
        _pointer(weight.scale),
        _pointer(weight.zero),
        _pointer(bias_O),
        _pointer(y_TO),
        _pointer(part),
        _pointer(arrived),
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
        ACTIVATIONS[activation],
    )
    defines = (("TOKENS", tokens), ("SLOTS", _MMA_SLOTS), *_kind(x_TI.dtype))
    slot_bytes = tokens * UNIT * 2 + _MMA_ROWS // STRIP * (512 + 2 * 64)
    program.kernel(_MMA_FILE, _ENTRY, defines).launch(
        (n_tiles, splits), _MMA_THREADS, (problem,), program.stream(), shared_bytes=_MMA_SLOTS * slot_bytes
    )


@cache
def _counters(device: torch.device, stream: int) -> Tensor:
    """Return counters that are zero between launches; launches of one stream follow each other."""
    return _new_counters(device, stream)


def _new_counters(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(_MMA_SPLIT_TILES, dtype=torch.int32, device=device)


def _maps(
    x_TI: Tensor, weight: Int4Weight, y_TO: Tensor, shape: Shape, scales: int, stored: tuple[int, int]
) -> ctypes.Array[ctypes.c_ubyte]:
    strips = shape.rows // STRIP
    scale, zero = (
        _map(planes, STRIP * planes.shape[1], (strips, STRIP * scales))
        for planes in (weight.scale, weight.scale if weight.zero is None else weight.zero)
    )
    return tensormap.argument(
        _map(x_TI, x_TI.shape[1], (shape.tokens, UNIT), swizzled=True),
        _map(weight.packed, weight.packed.shape[1] * 128, (strips, 128)),
        scale,
        zero,
        _map(y_TO, y_TO.shape[1], stored, swizzled=True),
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
