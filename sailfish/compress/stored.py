"""Makes an engine's tensors of linears that a checkpoint stores quantised, without rounding them again."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sailfish.checkpoint.formats.kept import StoredLinears
from sailfish.checkpoint.names import TensorSpec
from sailfish.kernels import int4
from sailfish.kernels.reference.quantised import EIGHT_BITS
from sailfish.models.load import ARENA_DTYPES
from sailfish.plan.types import Dtype, WeightFormat, WeightFormats


def stored_tensors(
    linears: StoredLinears, spec: TensorSpec, to: WeightFormat, formats: WeightFormats, dtype: Dtype
) -> list[Tensor]:
    """Return the tensors of a weight that `linears` hold, in the order of its parts.

    The numbers are the checkpoint's, restored ones rounded to `dtype`. Raises CheckpointError or
    UnsupportedModelError for a layer that is not what its config says.
    """
    if to == "plain":
        return [torch.from_numpy(linears.restored(spec)).to(ARENA_DTYPES[dtype])]
    if to == "int4":
        rows = linears.int4(
            spec,
            group=formats.group,
            zero_points=formats.zero_points,
            ordered=spec.name in formats.ordered,
        )
        zero_OG = None if rows.zero_OG is None else _tensor(rows.zero_OG).float()
        packed = int4.pack(
            _tensor(rows.code_OI), _tensor(rows.scale_OG), zero_OG, torch.float32, formats.layout
        )
        scale = packed.scale.bfloat16()
        tensors = [packed.packed, scale if torch.equal(scale.float(), packed.scale) else packed.scale]
        tensors += [] if packed.zero is None else [packed.zero.bfloat16()]
        return tensors if rows.order_I is None else [*tensors, torch.from_numpy(rows.order_I)]
    rows_8 = linears.rows_8(spec)
    tensors = [_tensor(rows_8.bits_OI).view(EIGHT_BITS[to]), _tensor(rows_8.scale_O)]
    return tensors if rows_8.input_scale is None else [*tensors, _tensor(rows_8.input_scale)]


def _tensor(array: NDArray[np.uint8] | NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
