"""Linear layers as compressed-tensors stores them: pack-quantized, int-quantized and float-quantized.

Packed: weight_packed int32 [O, ceil(I * bits / 32)] of code + 2^(bits - 1), weight_shape [O, I], zero points
packed along the outputs. Others: weight [O, I] in int8 or float8. weight_scale [O, G], or [1] for a tensor.
https://github.com/vllm-project/compressed-tensors (compressors/pack_quantized, naive_quantized).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from sailfish.base.errors import CheckpointError
from sailfish.checkpoint.files import shown
from sailfish.checkpoint.formats.linear import QuantisedLinear, check_g_idx
from sailfish.checkpoint.formats.parts import Parts
from sailfish.checkpoint.formats.scheme import LinearScheme
from sailfish.checkpoint.formats.tensors import FloatType, StoredTensor
from sailfish.checkpoint.formats.words import n_words, pack, unpack

_SIGN = np.uint8(128)
"""An int8 and its code differ in this bit alone."""


def read_compressed(parts: Parts, scheme: LinearScheme) -> QuantisedLinear:
    """Return the layer; the tensors' sizes must agree with each other and with the scheme."""
    code_OI = _packed(parts, scheme) if scheme.layout == "pack-quantized" else _plain(parts, scheme)
    n_out, n_in = code_OI.shape
    group = scheme.group if scheme.group is not None else n_in
    n_groups = -(-n_in // group)
    scale_OG, scale_dtype = _scale(parts, scheme, n_out, n_groups)
    g_idx = None
    if scheme.act_order:
        g_idx = check_g_idx(parts.array("weight_g_idx", "I32", n_in), group, n_groups, parts.where)
    input_scale = None
    if scheme.activations is not None and not scheme.activations.dynamic:
        input_scale = parts.floats("input_scale", 1)[0]
    return QuantisedLinear(
        code_OI=code_OI,
        scale_OG=scale_OG,
        zero_OG=None if scheme.symmetric else _zero(parts, scheme, n_out, n_groups),
        g_idx=g_idx,
        group=group,
        bits=scheme.bits,
        scale_dtype=scale_dtype,
        is_float=scheme.is_float,
        input_scale=input_scale,
    )


def write_compressed(linear: QuantisedLinear, scheme: LinearScheme) -> Mapping[str, StoredTensor]:
    """Return the tensors of a layer that `rejects_compressed` finds no fault with."""
    scale = linear.scale_OG[0] if scheme.strategy == "tensor" else linear.scale_OG
    tensors = {"weight_scale": StoredTensor.from_floats(scale, linear.scale_dtype)}
    if scheme.layout == "pack-quantized":
        tensors["weight_packed"] = _words(pack(linear.code_OI, linear.bits))
        tensors["weight_shape"] = StoredTensor(dtype="I64", array=np.array(linear.shape, "<i8"))
        if not scheme.symmetric:
            packed_GW = pack(np.ascontiguousarray(linear.zero_points.T), linear.bits)
            tensors["weight_zero_point"] = _words(np.ascontiguousarray(packed_GW.T))
    elif scheme.is_float:
        tensors["weight"] = StoredTensor(dtype="F8_E4M3", array=linear.code_OI)
    else:
        tensors["weight"] = _signed(linear.code_OI)
        if not scheme.symmetric:
            tensors["weight_zero_point"] = _signed(linear.zero_points)
    if scheme.act_order:
        tensors["weight_g_idx"] = _words(linear.group_of_input)
    if linear.input_scale is not None:
        tensors["input_scale"] = StoredTensor.from_floats(linear.input_scale, linear.scale_dtype)
    return tensors


def rejects_compressed(linear: QuantisedLinear, scheme: LinearScheme) -> str | None:
    """Return why the layout cannot hold a layer, None if it can."""
    if scheme.layout != "pack-quantized" and linear.bits != 8:
        return f"{scheme.layout} has 8 bits, not {linear.bits}"
    if scheme.strategy == "tensor" and not bool((linear.scale_OG == linear.scale_OG[0, 0]).all()):
        return "its rows have scales of their own and the scheme has one for all"
    return None


def _packed(parts: Parts, scheme: LinearScheme) -> NDArray[np.uint8]:
    sizes = parts.shaped("weight_shape", parts.take("weight_shape", "I64", "I32"), 2).array
    n_out, n_in = (int(size) for size in sizes)
    packed, n_rows, width = parts.matrix("weight_packed", "I32")
    dense, loose = (n_words(max(n_in, 0), scheme.bits, dense=is_dense) for is_dense in (True, False))
    # Before 0.20 no code of 3, 5, 6 or 7 bits lay across two words; then there are more words than needed.
    if n_rows != n_out or n_in < 1 or width not in (dense, loose):
        raise CheckpointError(
            f"{parts.where}: weight_packed has shape {shown([n_rows, width])}, "
            f"which does not fit weight_shape {shown([n_out, n_in])} in {scheme.bits} bits"
        )
    return unpack(packed, scheme.bits, n_in, dense=width == dense)


def _plain(parts: Parts, scheme: LinearScheme) -> NDArray[np.uint8]:
    array, _, _ = parts.matrix("weight", "F8_E4M3" if scheme.is_float else "I8")
    return np.ascontiguousarray(array) if scheme.is_float else _unsigned(array)


def _scale(
    parts: Parts, scheme: LinearScheme, n_out: int, n_groups: int
) -> tuple[NDArray[np.float32], FloatType]:
    if scheme.strategy != "tensor":
        return parts.floats("weight_scale", n_out, n_groups)
    scale, dtype = parts.floats("weight_scale", 1)
    return np.repeat(scale[:, None], n_out, 0), dtype


def _zero(parts: Parts, scheme: LinearScheme, n_out: int, n_groups: int) -> NDArray[np.uint8]:
    name = "weight_zero_point"
    if scheme.layout != "pack-quantized":
        return _unsigned(parts.array(name, "I8", n_out, n_groups))
    tensor = parts.take(name, "I32")
    width = tensor.array.shape[0] if tensor.array.ndim == 2 else 0
    is_loose = width == n_words(n_out, scheme.bits, dense=False)
    is_dense = width == n_words(n_out, scheme.bits)
    if not (is_dense or is_loose):
        raise CheckpointError(f"{parts.where}: {name} has shape {shown(list(tensor.array.shape))}")
    packed = parts.shaped(name, tensor, width, n_groups).array
    zero_GO = unpack(np.ascontiguousarray(packed.T), scheme.bits, n_out, dense=is_dense)
    return np.ascontiguousarray(zero_GO.T)


def _words(array: NDArray[np.int32]) -> StoredTensor:
    return StoredTensor(dtype="I32", array=array)


def _signed(code: NDArray[np.uint8]) -> StoredTensor:
    return StoredTensor(dtype="I8", array=(code ^ _SIGN).view(np.int8))


def _unsigned(array: NDArray[np.int8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).view(np.uint8) ^ _SIGN
