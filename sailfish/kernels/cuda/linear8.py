"""Multiplies 8-bit activations with 8-bit weights: tile shapes on Hopper, torch's products before it."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.kernels.contract import Quantised, Weight8
from sailfish.kernels.cuda import elementwise, program, tensormap
from sailfish.kernels.cuda.linear8_limits import FEWEST_INT_MM_ROWS, INT_MM_ROWS
from sailfish.kernels.cuda.program import Defines, Variant
from sailfish.kernels.cuda.wide import ACTIVATIONS

_FILE, _ENTRY = "wide8.cu", "wide_linear_8"
_SHARED_BYTES = {1: 227 << 10, 2: 113 << 10}
"""Shared memory of a block, by blocks on a multiprocessor."""
_UNIT_BYTES = 128
"""Of inputs, which a slot of the ring holds for each token and row."""
_TYPES = {torch.bfloat16: "bf16", torch.float32: "float"}
_SCALE_THREADS = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """How the Hopper kernel cuts the result into tiles."""

    tokens: int
    """Tokens of a tile."""
    tiles: int
    """64-row tiles of each warpgroup that multiplies."""
    unit_us: float
    """What a block takes for 128 bytes of a tile's inputs, on an H200."""
    groups: int = 2
    """Warpgroups of a block that multiply."""
    per_sm: int = 1
    """Blocks that fit on a multiprocessor."""

    @property
    def rows(self) -> int:
        """Return the outputs of a block's tile."""
        return 64 * self.groups * self.tiles

    @property
    def threads(self) -> int:
        """Return the threads of a block, the producers' warpgroup included."""
        return 128 * (self.groups + 1)

    @property
    def shared_bytes(self) -> int:
        """Return the shared memory of a block."""
        return _SHARED_BYTES[self.per_sm]

    @property
    def chunk(self) -> int:
        """Return the tokens that are stored at once."""
        return 32 if self.tokens % 64 or self.per_sm > 1 else 64

    @property
    def gated_chunk(self) -> int:
        """Return the tokens that are stored at once of half as many outputs, behind an activation."""
        return self.chunk if self.tokens % (2 * self.chunk) else 2 * self.chunk

    @property
    def slots(self) -> int:
        """Return the slots of 128 bytes of inputs that fit in shared memory."""
        slot_bytes = (self.tokens + self.rows) * _UNIT_BYTES + 16
        return min(8, (self.shared_bytes - self.groups * 2 * self.chunk * 128 - 8) // slot_bytes)

    @property
    def can_split(self) -> bool:
        """Say whether blocks can share a tile's inputs."""
        return self.tiles * self.tokens <= 128

    def defines(self, dtype: torch.dtype) -> Defines:
        """Return what the source is compiled with for numbers of one kind: int8, float8 or bfloat16."""
        return (
            ("INT8", int(dtype == torch.int8)),
            ("BF16", int(dtype == torch.bfloat16)),
            ("TOKENS", self.tokens),
            ("TILES", self.tiles),
            ("SLOTS", self.slots),
            ("GROUPS", self.groups),
            ("PER_SM", self.per_sm),
        )


SHAPES = (
    Shape(256, 1, 0.62),
    Shape(128, 2, 0.64),
    Shape(128, 1, 0.32),
    Shape(64, 2, 0.37),
    Shape(64, 1, 0.24),
    Shape(32, 1, 0.16, groups=1, per_sm=2),
)
_SPLIT_US = 4.0
"""What it takes two blocks to add up, and to be started together."""
VARIANTS = (
    *(
        Variant(_FILE, shape.defines(dtype), only=("sm_90a",))
        for shape in SHAPES
        for dtype in (torch.int8, torch.float8_e4m3fn)
    ),
    *(Variant("scale.cu", (("TYPE", type_),)) for type_ in _TYPES.values()),
)


class _Problem(ctypes.Structure):
    _fields_ = (
        ("x_scale", ctypes.c_void_p),
        ("w_scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n_tokens", ctypes.c_int),
        ("n_out", ctypes.c_int),
        ("n_units", ctypes.c_int),
        ("token_tiles", ctypes.c_int),
        ("row_tiles", ctypes.c_int),
        ("activation", ctypes.c_int),
    )


def wide_linear(
    x: Quantised, weight: Weight8, bias_O: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """Meet `contract.Linear8` on Hopper for bfloat16 results, inputs a multiple of 16, outputs of 8.

    With an activation, "silu" or "gelu_tanh": activation(gate) * up of it, [T, O / 2], for weights whose
    rows alternate by eights of gate and up. Each of gate, up and activation(gate) is rounded to bfloat16.
    A newer card, which runs other machine code, takes torch's product.
    """
    if program.architecture() != "sm_90a":
        y_TO = (int_mm_linear if weight.format == "int8" else scaled_mm_linear)(x, weight, bias_O)
        return y_TO if activation is None else cast(Tensor, elementwise.act_mul(y_TO, activation))
    n_out, n_in = weight.values_OI.shape
    assert activation is None or n_out % 16 == 0
    y_TO = _empty(x, n_out if activation is None else n_out // 2)
    if len(x):
        shape, splits = choose(len(x), n_out, n_in)
        launch(x, weight, bias_O, y_TO, shape, splits, activation)
    return y_TO


def int_mm_linear(x: Quantised, weight: Weight8, bias_O: Tensor | None = None) -> Tensor:
    """Meet `contract.Linear8` for int8 by torch's integer product and one kernel that scales its sums."""
    n_out = len(weight.values_OI)
    y_TO = _empty(x, n_out)
    kernel = program.kernel("scale.cu", "scale", (("TYPE", _TYPES[x.dtype]),))
    for begin in range(0, len(x), INT_MM_ROWS):
        x_TI, scale_T = x.values_TI[begin : begin + INT_MM_ROWS], x.scale_T[begin : begin + INT_MM_ROWS]
        padding = (0, 0, 0, max(0, FEWEST_INT_MM_ROWS - len(x_TI)))
        sum_TO = torch._int_mm(F.pad(x_TI, padding), weight.values_OI.T)
        kernel.launch(
            (len(x_TI), -(-n_out // (8 * _SCALE_THREADS))),
            _SCALE_THREADS,
            (sum_TO, scale_T, weight.scale_O, bias_O, y_TO[begin:], n_out),
            program.stream(),
            after=True,
        )
    return y_TO


def scaled_mm_linear(x: Quantised, weight: Weight8, bias_O: Tensor | None = None) -> Tensor:
    """Meet `contract.Linear8` for float8 by torch's product with scales of rows, in bfloat16."""
    if not len(x):
        return _empty(x, len(weight.values_OI))
    return torch._scaled_mm(
        x.values_TI,
        weight.values_OI.T,
        scale_a=x.scale_T[:, None],
        scale_b=weight.scale_O[None, :],
        bias=bias_O,
        out_dtype=x.dtype,
        use_fast_accum=True,
    )


def dequantised_linear(x: Quantised, weight: Weight8, bias_O: Tensor | None = None) -> Tensor:
    """Meet `contract.Linear8` without 8-bit units: bfloat16 holds every float8 exactly; scales come after."""
    y_TO = F.linear(x.values_TI.to(x.dtype), weight.values_OI.to(x.dtype)).float()
    y_TO = y_TO * x.scale_T[:, None] * weight.scale_O
    return (y_TO if bias_O is None else y_TO + bias_O.float()).to(x.dtype)


@cache
def choose(n_tokens: int, n_out: int, in_bytes: int) -> tuple[Shape, int]:
    """Return the tile shape for a product, and how many blocks share a tile's inputs, by predicted time.

    in_bytes: of a token's inputs.
    """
    n_units = -(-in_bytes // _UNIT_BYTES)

    def predicted_us(candidate: tuple[Shape, int]) -> float:
        shape, splits = candidate
        n_blocks = -(-n_tokens // shape.tokens) * -(-n_out // shape.rows) * splits
        n_waves = -(-n_blocks // (program.n_processors() * shape.per_sm))
        if splits > 1 and n_waves > 1:
            return math.inf
        return n_waves * -(-n_units // splits) * shape.unit_us + (splits > 1) * _SPLIT_US

    # Tiles of 32 tokens are for weights that are read once: two of them would not be ahead of one of 64.
    fitting = [shape for shape in SHAPES if shape.tokens >= min(n_tokens, 64)]
    splittable = [(shape, 2) for shape in fitting if shape.can_split and n_units > 1]
    return min([*((shape, 1) for shape in fitting), *splittable], key=predicted_us)


def launch(
    x: Quantised,
    weight: Weight8,
    bias_O: Tensor | None,
    y_TO: Tensor,
    shape: Shape,
    splits: int,
    activation: str | None = None,
) -> None:
    """Run the Hopper kernel with one tile shape, each tile's inputs split among 1 or 2 blocks.

    Only shapes that `can_split` are, and only with more than 128 inputs.
    """
    run(x.values_TI, weight.values_OI, (x.scale_T, weight.scale_O, bias_O), y_TO, shape, splits, activation)


def run(
    x_TI: Tensor,
    weight_OI: Tensor,
    scales_and_bias: tuple[Tensor | None, Tensor | None, Tensor | None],
    y_TO: Tensor,
    shape: Shape,
    splits: int,
    activation: str | None,
) -> None:
    """Run the Hopper kernel on operands of 8 bits, or of bfloat16 with no scales of tokens and rows."""
    (n_tokens, n_in), n_out = x_TI.shape, len(weight_OI)
    unit = _UNIT_BYTES // x_TI.element_size()
    token_tiles = -(-n_tokens // shape.tokens)
    row_tiles = -(-n_out // shape.rows)
    n_units = -(-n_in // unit)
    n_tiles = token_tiles * row_tiles
    n_at_once = program.n_processors() * shape.per_sm
    n_clusters = n_tiles if splits > 1 else min(n_tiles, n_at_once)
    stored_tokens = shape.chunk if activation is None else shape.gated_chunk
    stored = (stored_tokens if splits == 1 else 8, 64 if activation is None else 32)
    maps = tensormap.argument(
        _map(x_TI, (shape.tokens, unit)),
        _map(weight_OI, (shape.rows, unit)),
        _map(y_TO, stored),
    )
    scales = (None if given is None else given.data_ptr() for given in scales_and_bias)
    sizes = (n_tokens, n_out, n_units, token_tiles, row_tiles)
    program.kernel(_FILE, _ENTRY, shape.defines(x_TI.dtype)).launch(
        (n_clusters * splits,),
        shape.threads,
        (maps, _Problem(*scales, *sizes, ACTIVATIONS[activation])),
        program.stream(),
        shared_bytes=shape.shared_bytes,
        after=True,
        cluster=splits,
    )


def _empty(x: Quantised, n_out: int) -> Tensor:
    return torch.empty(len(x), n_out, dtype=x.dtype, device=x.values_TI.device)


def _map(x: Tensor, box: tuple[int, int]) -> bytes:
    dtype = "bfloat16" if x.dtype == torch.bfloat16 else "uint8"
    row_bytes = x.stride(0) * x.element_size()
    return tensormap.matrix(x.data_ptr(), dtype, x.shape[0], x.shape[1], row_bytes, box, swizzled=True)
