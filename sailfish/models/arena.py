"""Where each weight lies in the one allocation that holds them all. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from sailfish.plan.memory import ARENA_ALIGN_BYTES, ITEM_BYTES
from sailfish.plan.types import Dtype


def arena_layout(shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: Dtype) -> tuple[dict[str, int], int]:
    """Return the offset of each named tensor, and the arena's size, in bytes."""
    offsets: dict[str, int] = {}
    end = 0
    for name, shape in shapes:
        assert name not in offsets, "tensor names are distinct"
        offsets[name] = end
        end += -(-prod(shape) * ITEM_BYTES[dtype] // ARENA_ALIGN_BYTES) * ARENA_ALIGN_BYTES
    return offsets, end
