"""Reads the weights of a quantised checkpoint as an engine keeps them: rows of several linears joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sailfish.base.errors import UnsupportedModelError
from sailfish.checkpoint.formats.codec import layer_tensors, read_linear
from sailfish.checkpoint.formats.config import load_quant_config
from sailfish.checkpoint.formats.linear import QuantisedLinear
from sailfish.checkpoint.formats.scheme import LinearScheme
from sailfish.checkpoint.formats.stored import checkpoint_schemes, is_same_order
from sailfish.checkpoint.formats.tensors import StoredTensor
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.checkpoint.names import TensorSpec, linear_modules
from sailfish.checkpoint.safetensors_reader import Checkpoint

_MIDDLE = 8
_SIGN = np.uint8(128)
"""An int8 and its code differ in this bit alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Rows:
    """A weight as codes of 4 bits: w = (code - zero) * scale."""

    code_OI: NDArray[np.uint8]
    scale_OG: NDArray[np.float32]
    zero_OG: NDArray[np.uint8] | None
    """None: 8 everywhere."""
    order_I: NDArray[np.int32] | None
    """Which of the model's inputs each of its own is. None: they are the model's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows8:
    """A weight in 8 bits: w = value * scale."""

    bits_OI: NDArray[np.uint8]
    """Of int8 or E4M3 numbers."""
    scale_O: NDArray[np.float32]
    input_scale: NDArray[np.float32] | None
    """[1] of all inputs; None: each token has its own."""


class StoredLinears:
    """The quantised linears of a checkpoint, by the engine's tensors that are made of their rows."""

    def __init__(self, checkpoint: Checkpoint, model: ModelConfig) -> None:
        """Name the checkpoint that `model.stored` says is quantised; raises as its config's readers do."""
        config = load_quant_config(checkpoint.directory)
        assert config is not None, "the model's config was read from the same directory"
        self._checkpoint = checkpoint
        self._schemes = checkpoint_schemes(config, model, checkpoint)

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: ModelConfig) -> StoredLinears | None:
        """Return them, None where the checkpoint is not quantised."""
        return None if model.stored is None else cls(checkpoint, model)

    def holds(self, spec: TensorSpec) -> bool:
        """Say whether any row of a tensor is stored quantised."""
        return any(self._schemes.get(module) is not None for module in linear_modules(spec))

    def int4(self, spec: TensorSpec, *, group: int, zero_points: bool, ordered: bool) -> Int4Rows:
        """Return a tensor whose linears have 4 bits or fewer, in groups that may be cut up into `group`.

        Rows are in the engine's order, inputs too unless `ordered`. UnsupportedModelError where a layer is
        not what the config says.
        """
        linears = self._quantised(spec)
        orders = [linear.order for _, linear in linears]
        order_I = orders[0] if ordered else None
        if not all(is_same_order(order, order_I) for order in orders):
            raise UnsupportedModelError(
                f"{linears[0][0]} has its inputs in act-order, which quantization_config does not say",
                hint='set "desc_act": true in config.json',
            )
        parts = [_int4(linear, order_I, group, zero_points, name) for name, linear in linears]
        order_O = row_order(spec)
        zeros = [part.zero_OG for part in parts if part.zero_OG is not None]
        return Int4Rows(
            code_OI=_joined([part.code_OI for part in parts], order_O),
            scale_OG=_joined([part.scale_OG for part in parts], order_O),
            zero_OG=_joined(zeros, order_O) if zeros else None,
            order_I=None if order_I is None else order_I.astype(np.int32),
        )

    def rows_8(self, spec: TensorSpec) -> Rows8:
        """Return a tensor whose linears have 8 bits and a scale for each row, or for all."""
        linears = [linear for _, linear in self._quantised(spec)]
        order_O = row_order(spec)
        bits = [linear.code_OI if linear.is_float else linear.code_OI ^ _SIGN for linear in linears]
        return Rows8(
            bits_OI=_joined(bits, order_O),
            scale_O=_joined([linear.scale_OG[:, 0] for linear in linears], order_O),
            input_scale=linears[0].input_scale,
        )

    def restored(self, spec: TensorSpec) -> NDArray[np.float32]:
        """Return a tensor as float32 numbers, dense rows among them as they are, in its sources' order."""
        rows = []
        for module, shape in zip(linear_modules(spec), spec.source_shapes, strict=True):
            scheme = self._schemes[module]
            if scheme is None:
                dense = StoredTensor.from_checkpoint(self._checkpoint, f"{module}.weight")
                rows.append(dense.floats().reshape(shape))
            else:
                rows.append(self._read(module, scheme, shape).dequantise())
        return np.concatenate(rows).reshape(spec.shape)

    def _quantised(self, spec: TensorSpec) -> list[tuple[str, QuantisedLinear]]:
        found = []
        for module, shape in zip(linear_modules(spec), spec.source_shapes, strict=True):
            scheme = self._schemes[module]
            assert scheme is not None, module
            found.append((module, self._read(module, scheme, shape)))
        return found

    def _read(self, module: str, scheme: LinearScheme, shape: tuple[int, ...]) -> QuantisedLinear:
        n_out, n_in = shape
        return read_linear(layer_tensors(self._checkpoint, module), scheme, module, (n_out, n_in))


def row_order(spec: TensorSpec) -> NDArray[np.int64] | None:
    """Return which row of its sources each row of a tensor in memory is; None: they are in order."""
    n_rows = spec.shape[0]
    if not spec.run:
        return None
    return np.arange(n_rows).reshape(2, -1, spec.run).swapaxes(0, 1).ravel()


def _int4(
    linear: QuantisedLinear, order_I: NDArray[np.int64] | None, group: int, zero_points: bool, where: str
) -> Int4Rows:
    if linear.zero_OG is not None and not zero_points:
        raise UnsupportedModelError(
            f"{where} has zero points, though quantization_config calls it symmetric",
            hint="correct quantization_config in config.json",
        )
    middle = 1 << (linear.bits - 1)
    n_in = linear.shape[1]
    code_OI = linear.code_OI if order_I is None else np.take(linear.code_OI, order_I, axis=1)
    group_of_G = np.arange(-(-n_in // group)) * group // linear.group
    if zero_points:
        zero_OG = np.ascontiguousarray(linear.zero_points[:, group_of_G])
        return Int4Rows(
            code_OI=code_OI, scale_OG=linear.scale_OG[:, group_of_G], zero_OG=zero_OG, order_I=None
        )
    if middle != _MIDDLE:
        code_OI = code_OI + np.uint8(_MIDDLE - middle)
    return Int4Rows(code_OI=code_OI, scale_OG=linear.scale_OG[:, group_of_G], zero_OG=None, order_I=None)


def _joined(rows: Sequence[NDArray[Any]], order_O: NDArray[np.int64] | None) -> NDArray[Any]:
    joined = np.concatenate(rows)
    return joined if order_O is None else np.ascontiguousarray(joined[order_O])
