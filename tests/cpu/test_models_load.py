"""Weights reach their place in the arena, exactly, whatever pieces they come in."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sailfish.base.errors import ArtifactError
from sailfish.models import load
from sailfish.models.arena import arena_layout
from sailfish.models.load import ARENA_DTYPES, SOURCE_DTYPES, load_weights
from sailfish.plan.memory import ARENA_ALIGN_BYTES


def _bytes(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5),
    dtype=st.sampled_from(sorted(ARENA_DTYPES)),
)
def test_tensors_lie_aligned_and_apart(shapes: list[tuple[int, ...]], dtype: str) -> None:
    offsets, n_bytes = arena_layout([(str(i), shape) for i, shape in enumerate(shapes)], dtype)
    ends = [*list(offsets.values())[1:], n_bytes]
    for (name, offset), end in zip(offsets.items(), ends, strict=True):
        size = torch.Size(shapes[int(name)]).numel() * ARENA_DTYPES[dtype].itemsize
        assert offset % ARENA_ALIGN_BYTES == 0
        assert size <= end - offset < size + ARENA_ALIGN_BYTES


@pytest.mark.parametrize("dtype", ARENA_DTYPES)
@pytest.mark.parametrize("staging_bytes", [4, 64, 1 << 20])
def test_pieces_of_any_source_dtype_are_joined_and_converted(
    dtype: str, staging_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_STAGING_BYTES", staging_bytes)
    draw = random.Random(staging_bytes)
    expected, tensors = {}, []
    for i in range(6):
        rows = [(draw.randint(1, 5), draw.choice(sorted(SOURCE_DTYPES))) for _ in range(draw.randint(1, 4))]
        parts = [torch.randn(n, 7).to(SOURCE_DTYPES[source]) for n, source in rows]
        expected[f"w{i}"] = torch.cat([part.to(ARENA_DTYPES[dtype]) for part in parts])
        pieces = [(memoryview(_bytes(part)), source) for part, (_, source) in zip(parts, rows, strict=True)]
        tensors.append((f"w{i}", tuple(expected[f"w{i}"].shape), pieces))
    offsets, n_bytes = arena_layout([(name, shape) for name, shape, _ in tensors], dtype)
    arena = torch.zeros(n_bytes, dtype=torch.uint8)
    weights = load_weights(tensors, arena, offsets, dtype)
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor)
        assert weights[name].data_ptr() == arena.data_ptr() + offsets[name]


def test_pieces_that_do_not_fill_the_shape_are_refused() -> None:
    offsets, n_bytes = arena_layout([("w", (2, 3))], "float32")
    arena = torch.zeros(n_bytes, dtype=torch.uint8)
    with pytest.raises(ArtifactError, match=r"tensor w \[2, 3\] needs 6 elements, its pieces hold 5"):
        load_weights([("w", (2, 3), [(_bytes(torch.zeros(5)), "F32")])], arena, offsets, "float32")


def test_missing_surplus_and_repeated_tensors_are_refused() -> None:
    offsets, n_bytes = arena_layout([("w", (1,))], "float32")
    arena = torch.zeros(n_bytes, dtype=torch.uint8)
    one = [(_bytes(torch.zeros(1)), "F32")]
    with pytest.raises(ArtifactError, match="tensor w is missing"):
        load_weights([], arena, offsets, "float32")
    with pytest.raises(ArtifactError, match="tensor v is not expected"):
        load_weights([("v", (1,), one)], arena, offsets, "float32")
    with pytest.raises(ArtifactError, match="tensor w is not expected, or comes twice"):
        load_weights([("w", (1,), one), ("w", (1,), one)], arena, offsets, "float32")
