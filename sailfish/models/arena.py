"""Where each tensor lies in the one allocation that holds all weights. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from sailfish.plan.formats import ArenaTensor
from sailfish.plan.memory import ARENA_ALIGN_BYTES
from sailfish.plan.types import Dtype


def arena_layout(tensors: Iterable[ArenaTensor], dtype: Dtype) -> tuple[dict[str, int], int]:
    """Return the offset of each named tensor, and the arena's size, in bytes; plain ones are in `dtype`."""
    offsets: dict[str, int] = {}
    end = 0
    for tensor in tensors:
        assert tensor.name not in offsets, "tensor names are distinct"
        offsets[tensor.name] = end
        end += -(-tensor.n_bytes(dtype) // ARENA_ALIGN_BYTES) * ARENA_ALIGN_BYTES
    return offsets, end
