"""Fill the weight arena from pieces of files, converting dtypes on the way without a second full copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from sailfish.base.errors import ArtifactError

SOURCE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What a piece may hold, as safetensors spells it."""
ARENA_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_STAGING_BYTES = 16 << 20


def load_weights(
    tensors: Iterable[tuple[str, tuple[int, ...], Sequence[tuple[memoryview | bytes, str]]]],
    arena: Tensor,
    offsets: Mapping[str, int],
    dtype: str,
) -> dict[str, Tensor]:
    """Copy each (name, shape, pieces) to its offset in `arena` and return views of it by name.

    Pieces are (bytes, source dtype); their elements follow each other. `arena` is uint8 on any device,
    laid out by `arena_layout`; only it and one small staging buffer are written. Raises ArtifactError if
    the pieces do not fill a shape, or names and offsets differ.
    """
    weights: dict[str, Tensor] = {}
    staging = torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=arena.is_cuda)
    for name, shape, pieces in tensors:
        if name not in offsets or name in weights:
            raise ArtifactError(
                f"tensor {name} is not expected, or comes twice", hint="build the engine again"
            )
        n_elements = prod(shape)
        n_found = sum(len(data) // SOURCE_DTYPES[source].itemsize for data, source in pieces)
        if n_found != n_elements:
            raise ArtifactError(
                f"tensor {name} {list(shape)} needs {n_elements} elements, its pieces hold {n_found}",
                hint="build the engine again",
            )
        to = ARENA_DTYPES[dtype]
        flat = arena[offsets[name] : offsets[name] + n_elements * to.itemsize].view(to)
        weights[name] = flat.view(shape)
        for data, source in pieces:
            n = len(data) // SOURCE_DTYPES[source].itemsize
            _copy(data, SOURCE_DTYPES[source], flat[:n], staging)
            flat = flat[n:]
    if missing := offsets.keys() - weights.keys():
        raise ArtifactError(f"tensor {min(missing)} is missing", hint="build the engine again")
    return weights


def _copy(data: memoryview | bytes, source: torch.dtype, to: Tensor, staging: Tensor) -> None:
    """Copy one piece through the staging buffer, or straight where nothing has to change."""
    raw = np.frombuffer(data, dtype=np.uint8)
    if to.device.type == "cpu" and to.dtype == source:
        to.view(torch.uint8).numpy()[:] = raw
        return
    staged = staging.numpy()
    for start in range(0, len(raw), len(staged)):
        part = raw[start : start + len(staged)]
        staged[: len(part)] = part
        first, n = start // source.itemsize, len(part) // source.itemsize
        to[first : first + n].copy_(staging[: len(part)].view(source))
