"""Where each weight lies in the one allocation that holds them all. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

ALIGN_BYTES = 256
"""What CUDA's allocator aligns to, and more than any vector load needs."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


def arena_layout(shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: str) -> tuple[dict[str, int], int]:
    """Return the offset of each named tensor, and the arena's size, in bytes."""
    offsets: dict[str, int] = {}
    end = 0
    for name, shape in shapes:
        assert name not in offsets, "tensor names are distinct"
        offsets[name] = end
        end += -(-prod(shape) * ITEM_BYTES[dtype] // ALIGN_BYTES) * ALIGN_BYTES
    return offsets, end
