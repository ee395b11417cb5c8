"""Linear layers as GPTQ checkpoints store them (AutoGPTQ, GPTQModel): codes packed along the inputs.

qweight int32 [I * bits / 32, O], qzeros int32 [G, O * bits / 32], scales [G, O], g_idx int32 [I], lowest bits
first. In the older layout, "gptq", 1 was taken from each zero point; "gptq_v2" stores them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from sailfish.base.errors import CheckpointError
from sailfish.checkpoint.formats.linear import QuantisedLinear, check_g_idx
from sailfish.checkpoint.formats.parts import Parts
from sailfish.checkpoint.formats.scheme import LinearScheme
from sailfish.checkpoint.formats.tensors import StoredTensor
from sailfish.checkpoint.formats.words import WORD_BITS, pack, unpack


def read_gptq(parts: Parts, scheme: LinearScheme) -> QuantisedLinear:
    """Return the layer; zero_OG is None where every zero point is the middle code."""
    bits = scheme.bits
    packed, n_rows, n_out = parts.matrix("qweight", "I32")
    if n_rows * WORD_BITS % bits or n_out * bits % WORD_BITS:
        raise CheckpointError(
            f"{parts.where}: qweight has shape [{n_rows}, {n_out}], which no whole words of {bits} bits fill"
        )
    n_in = n_rows * WORD_BITS // bits
    group = n_in if scheme.group is None else scheme.group
    n_groups = -(-n_in // group)
    scale_GO, scale_dtype = parts.floats("scales", n_groups, n_out)
    qzeros = parts.array("qzeros", "I32", n_groups, n_out * bits // WORD_BITS)
    zero_OG = np.ascontiguousarray(_zeros(qzeros, scheme, n_out).T)
    middle = 1 << (bits - 1)
    # Some symmetric checkpoints say "gptq" and hold the zero points of "gptq_v2", which read as one too many.
    is_mislabelled = scheme.layout == "gptq" and scheme.symmetric and bool((zero_OG == middle + 1).all())
    g_idx = None
    if scheme.act_order or parts.has("g_idx"):
        stored = parts.array("g_idx", "I32", n_in)
        # Where nothing was reordered some tools leave zeros here, which then say nothing.
        if scheme.act_order or stored.any():
            g_idx = check_g_idx(stored, group, n_groups, parts.where)
    return QuantisedLinear(
        code_OI=unpack(np.ascontiguousarray(packed.T), bits, n_in),
        scale_OG=np.ascontiguousarray(scale_GO.T),
        zero_OG=None if is_mislabelled or bool((zero_OG == middle).all()) else zero_OG,
        g_idx=g_idx,
        group=group,
        bits=bits,
        scale_dtype=scale_dtype,
    )


def write_gptq(linear: QuantisedLinear, scheme: LinearScheme) -> Mapping[str, StoredTensor]:
    """Return the tensors of a layer that `rejects_gptq` finds no fault with."""
    arrays = {
        "qweight": np.ascontiguousarray(pack(linear.code_OI, linear.bits).T),
        "qzeros": _stored_zeros(np.ascontiguousarray(linear.zero_points.T), scheme),
        "g_idx": linear.group_of_input,
    }
    scales = StoredTensor.from_floats(np.ascontiguousarray(linear.scale_OG.T), linear.scale_dtype)
    return {name: StoredTensor(dtype="I32", array=array) for name, array in arrays.items()} | {
        "scales": scales
    }


def rejects_gptq(linear: QuantisedLinear) -> str | None:
    """Return why the layout cannot hold a layer, None if it can."""
    n_out, n_in = linear.shape
    if linear.bits not in (2, 3, 4, 8):
        return f"GPTQ has 2, 3, 4 or 8 bits, not {linear.bits}"
    if n_in * linear.bits % WORD_BITS or n_out * linear.bits % WORD_BITS:
        return f"{n_out} outputs and {n_in} inputs of {linear.bits} bits do not fill whole words"
    return None


def _zeros(qzeros: NDArray[np.int32], scheme: LinearScheme, n_out: int) -> NDArray[np.uint8]:
    bits = scheme.bits
    if scheme.layout == "gptq_v2":
        return unpack(qzeros, bits, n_out)
    if WORD_BITS % bits:  # a code lies across two words, so words cannot be added to
        return unpack(qzeros, bits, n_out) + np.uint8(1) & np.uint8((1 << bits) - 1)
    return unpack(_plus_ones(qzeros, bits, 1), bits, n_out)


def _stored_zeros(zero_GO: NDArray[np.uint8], scheme: LinearScheme) -> NDArray[np.int32]:
    bits = scheme.bits
    if scheme.layout == "gptq_v2":
        return pack(zero_GO, bits)
    if WORD_BITS % bits:
        return pack(zero_GO - np.uint8(1) & np.uint8((1 << bits) - 1), bits)
    return _plus_ones(pack(zero_GO, bits), bits, -1)


def _plus_ones(words: NDArray[np.int32], bits: int, sign: int) -> NDArray[np.int32]:
    """Add 1 to each code of the words at once, as GPTQModel does: a zero point of 0 borrows from the next."""
    ones = int(pack(np.ones(WORD_BITS // bits, np.uint8), bits).view("<u4")[0])
    return (words.view("<u4") + np.uint32(ones * sign % (1 << WORD_BITS))).view("<i4")
