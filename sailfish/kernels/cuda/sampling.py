"""Draws one token per row from its logits on the GPU; the law is `engine.sampler.sample`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sailfish.kernels.cuda import program
from sailfish.kernels.cuda.program import Variant
from sailfish.kernels.rows import Rows

VARIANTS = tuple(Variant("sampling.cu", (("TYPE", type_),)) for type_ in ("bf16", "float"))

_TYPES = {torch.bfloat16: "bf16", torch.float32: "float"}
_THREADS = 512
_TILE = _THREADS * 8
_PICK_THREADS = 1024
_COUNTS_BYTES = 8192 * 8
"""Two words for each value of bfloat16 that counts, in shared memory."""
_BLOCKS_PER_PROCESSOR = 2
_PARTIAL_BYTES = 24


class _Rows(ctypes.Structure):
    """`struct Rows` of the kernels: the columns of the table, then the widths of those that have one."""

    _pointers = (
        *("token_RC", "n_prompt_R", "top_k_R", "min_length_R", "barred_RS", "n_barred_R", "bias_id_RB"),
        *("n_bias_R", "temperature_R", "top_p_R", "min_p_R", "penalties_R3", "bias_RB", "seed_R"),
    )
    _widths = ("token_RC", "barred_RS", "bias_RB")
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _pointers),
        *((f"{name}_width", ctypes.c_int) for name in _widths),
    )

    @classmethod
    def of(cls, rows: Rows) -> _Rows:
        pointers = [getattr(rows, name).data_ptr() for name in cls._pointers]
        return cls(*pointers, *(getattr(rows, name).shape[1] for name in cls._widths))


def pick(logits_SV: Tensor, row_S: Tensor, length_S: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return (token_S int64, finite_S bool), every choice made on the device. May mutate float32 logits.

    logits_SV: bfloat16 or float32, contiguous. row_S, length_S: int32, the table row of each sample and
    the tokens before the drawn one. bfloat16 logits of rows that are both changed and filtered are kept
    in float32: S * V * 4 bytes of temporary memory.
    """
    n_rows, n_vocab = logits_SV.shape
    token_S = row_S.new_empty(n_rows, dtype=torch.int64)
    finite_S = row_S.new_empty(n_rows, dtype=torch.bool)
    if not n_rows:
        return token_S, finite_S
    assert logits_SV.is_contiguous() and row_S.dtype == length_S.dtype == torch.int32
    n_tiles = -(-n_vocab // _TILE)
    most_slices = max(1, program.n_processors() * _BLOCKS_PER_PROCESSOR // n_rows)
    tiles_per_slice = -(-n_tiles // most_slices)
    n_slices = -(-n_tiles // tiles_per_slice)
    partial = torch.empty(n_rows * n_slices * _PARTIAL_BYTES, dtype=torch.uint8, device=logits_SV.device)
    adjusted_SV = (
        logits_SV if logits_SV.dtype == torch.float32 else torch.empty_like(logits_SV, dtype=torch.float32)
    )
    is_whole = n_vocab % 8 == 0 and logits_SV.data_ptr() % 16 == 0
    table, stream, defines = _Rows.of(rows), program.stream(), (("TYPE", _TYPES[logits_SV.dtype]),)
    step = (logits_SV, adjusted_SV, table, row_S, length_S, n_vocab)
    program.kernel("sampling.cu", "score", defines).launch(
        (n_slices, n_rows), _THREADS, (*step, tiles_per_slice, is_whole, partial), stream, after=True
    )
    program.kernel("sampling.cu", "pick", defines).launch(
        (n_rows,),
        _PICK_THREADS,
        (*step, is_whole, partial, n_slices, token_S, finite_S),
        stream,
        shared_bytes=_COUNTS_BYTES,
        after=True,
    )
    return token_S, finite_S
