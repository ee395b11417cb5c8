"""Rows of an embedding in int8 as a CUDA kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from sailfish.kernels.contract import Weight8
from sailfish.kernels.cuda import program
from sailfish.kernels.cuda.elementwise import TYPES

_THREADS = 256


def embed_int8(token_T: Tensor, weight: Weight8, scale: float, dtype: torch.dtype) -> Tensor:
    """Meet `contract.EmbedInt8`."""
    width = weight.values_OI.shape[1]
    out_TD = weight.scale_O.new_empty((len(token_T), width), dtype=dtype)
    if len(token_T):
        is_whole = width % 8 == 0 and weight.values_OI.data_ptr() % 16 == 0
        program.kernel("embed.cu", "embed_int8", (("TYPE", TYPES[dtype]),)).launch(
            (len(token_T), -(-width // (8 * _THREADS))),
            _THREADS,
            (token_T, weight.values_OI, weight.scale_O, out_TD, width, scale, is_whole),
            program.stream(),
            after=True,
        )
    return out_TD
