"""Linear layers as AWQ "gemm" checkpoints store them (AutoAWQ): 4-bit codes packed along the outputs.

qweight int32 [I, O / 8], qzeros int32 [G, O / 8], scales [G, O]. The nibbles of a word, lowest first, are
those of its outputs 0, 2, 4, 6, 1, 3, 5, 7 (https://github.com/casper-hansen/AutoAWQ, packing_utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from sailfish.base.errors import CheckpointError
from sailfish.checkpoint.formats.linear import QuantisedLinear
from sailfish.checkpoint.formats.parts import Parts
from sailfish.checkpoint.formats.scheme import LinearScheme
from sailfish.checkpoint.formats.tensors import StoredTensor

BITS = 4
_MIDDLE = 8
_PER_WORD = 8
_OUTPUT_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def read_awq(parts: Parts, scheme: LinearScheme) -> QuantisedLinear:
    """Return the layer; zero_OG is None where every zero point is the middle code."""
    packed, n_in, n_words = parts.matrix("qweight", "I32")
    n_out = n_words * _PER_WORD
    group = n_in if scheme.group is None else scheme.group
    if n_in % group:
        raise CheckpointError(f"{parts.where}: {n_in} inputs are not whole groups of {group}")
    scale_GO, scale_dtype = parts.floats("scales", n_in // group, n_out)
    zero_OG = _unpack(parts.array("qzeros", "I32", n_in // group, n_words))
    return QuantisedLinear(
        code_OI=_unpack(packed),
        scale_OG=np.ascontiguousarray(scale_GO.T),
        zero_OG=None if bool((zero_OG == _MIDDLE).all()) else zero_OG,
        g_idx=None,
        group=group,
        bits=BITS,
        scale_dtype=scale_dtype,
    )


def write_awq(linear: QuantisedLinear) -> Mapping[str, StoredTensor]:
    """Return the tensors of a layer that `rejects_awq` finds no fault with."""
    return {
        "qweight": StoredTensor(dtype="I32", array=_pack(linear.code_OI)),
        "qzeros": StoredTensor(dtype="I32", array=_pack(linear.zero_points)),
        "scales": StoredTensor.from_floats(np.ascontiguousarray(linear.scale_OG.T), linear.scale_dtype),
    }


def rejects_awq(linear: QuantisedLinear) -> str | None:
    """Return why the layout cannot hold a layer, None if it can."""
    n_out, n_in = linear.shape
    if linear.bits != BITS:
        return f"AWQ has {BITS} bits, not {linear.bits}"
    if linear.g_idx is not None:
        return "AWQ has no act-order"
    if n_out % _PER_WORD or n_in % linear.group:
        return f"{n_out} outputs and {n_in} inputs are not whole words and groups of {linear.group}"
    return None


def _unpack(words_KW: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Return [O, K] codes of the words [K, O / 8]."""
    n_rows, n_words = words_KW.shape
    words_WK = np.ascontiguousarray(words_KW.T).view("<u4")
    code_OK = np.empty((n_words * _PER_WORD, n_rows), np.uint8)
    for nibble, output in enumerate(_OUTPUT_OF_NIBBLE):
        code_OK[output::_PER_WORD] = words_WK >> np.uint32(BITS * nibble) & np.uint32(0xF)
    return code_OK


def _pack(code_OK: NDArray[np.uint8]) -> NDArray[np.int32]:
    n_out, n_rows = code_OK.shape
    words_WK = np.zeros((n_out // _PER_WORD, n_rows), "<u4")
    for nibble, output in enumerate(_OUTPUT_OF_NIBBLE):
        words_WK |= code_OK[output::_PER_WORD].astype("<u4") << np.uint32(BITS * nibble)
    return np.ascontiguousarray(words_WK.T).view("<i4")
