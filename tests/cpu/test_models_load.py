"""Weights reach their place in the arena, exactly, whatever pieces they come in."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged import BytesPiece

from sailfish.base.errors import ArtifactError
from sailfish.models import load
from sailfish.models.arena import arena_layout
from sailfish.models.load import ARENA_DTYPES, DTYPES, load_weights
from sailfish.plan.formats import ArenaTensor
from sailfish.plan.memory import ARENA_ALIGN_BYTES
from sailfish.plan.types import Dtype

SOURCES = ("F32", "F16", "BF16")


def _plain(name: str, shape: tuple[int, ...]) -> ArenaTensor:
    return ArenaTensor(name=name, shape=shape, dtype=None)


def _bytes(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5),
    dtype=st.sampled_from(sorted(ARENA_DTYPES)),
)
def test_tensors_lie_aligned_and_apart(shapes: list[tuple[int, ...]], dtype: str) -> None:
    offsets, n_bytes = arena_layout([_plain(str(i), shape) for i, shape in enumerate(shapes)], dtype)
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
    expected, tensors, pieces = {}, [], {}
    for i in range(6):
        rows = [(draw.randint(1, 5), draw.choice(SOURCES)) for _ in range(draw.randint(1, 4))]
        parts = [torch.randn(n, 7).to(DTYPES[source]) for n, source in rows]
        expected[f"w{i}"] = torch.cat([part.to(ARENA_DTYPES[dtype]) for part in parts])
        pieces[f"w{i}"] = [BytesPiece(_bytes(x), source) for x, (_, source) in zip(parts, rows, strict=True)]
        tensors.append(_plain(f"w{i}", tuple(expected[f"w{i}"].shape)))
    offsets, n_bytes = arena_layout(tensors, dtype)
    arena = torch.zeros(n_bytes, dtype=torch.uint8)
    weights = load_weights(tensors, pieces, arena, dtype)
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor)
        assert weights[name].data_ptr() == arena.data_ptr() + offsets[name]


@pytest.mark.parametrize("stored", ["I32", "I8", "F8_E4M3", "BF16", "F32"])
def test_a_tensor_with_a_dtype_of_its_own_keeps_it_whatever_the_plan_has(stored: str) -> None:
    tensors = [ArenaTensor(name="w", shape=(3, 5), dtype=stored), _plain("v", (1,))]
    n_bytes = 15 * DTYPES[stored].itemsize
    data = torch.arange(n_bytes, dtype=torch.uint8)
    pieces = {"w": [BytesPiece(_bytes(data), stored)], "v": [BytesPiece(_bytes(torch.ones(1)), "F32")]}
    arena = torch.zeros(arena_layout(tensors, "bfloat16")[1], dtype=torch.uint8)
    weights = load_weights(tensors, pieces, arena, "bfloat16")
    assert weights["w"].dtype == DTYPES[stored] and weights["w"].shape == (3, 5)
    assert torch.equal(weights["w"].flatten().view(torch.uint8), data)
    assert weights["v"] == torch.ones(1, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", ARENA_DTYPES)
@pytest.mark.parametrize("staging_bytes", [4, 64, 500, 1 << 20])
@pytest.mark.parametrize("shape", [(7,), ()], ids=["weight", "bias"])
def test_halves_take_turns_whatever_pieces_they_come_in(
    shape: tuple[int, ...], staging_bytes: int, dtype: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_STAGING_BYTES", staging_bytes)
    draw = random.Random(staging_bytes)
    for _ in range(10):
        n_turns = draw.randint(1, 6)
        whole = torch.randn(n_turns * 16, *shape)
        cuts = sorted(draw.randint(1, len(whole) - 1) for _ in range(draw.randint(0, 3)))
        pieces = []
        for rows in torch.tensor_split(whole, cuts):
            source = draw.choice(SOURCES)
            pieces += [BytesPiece(_bytes(rows.to(DTYPES[source])), source)] if len(rows) else []
            rows.copy_(rows.to(DTYPES[source]).to(ARENA_DTYPES[dtype]))
        expected = whole.view(2, n_turns, 8, *shape).transpose(0, 1).reshape(whole.shape)
        tensors = [ArenaTensor(name="w", shape=tuple(whole.shape), dtype=None, run=8)]
        arena = torch.zeros(arena_layout(tensors, dtype)[1], dtype=torch.uint8)
        found = load_weights(tensors, {"w": pieces}, arena, dtype)["w"]
        assert torch.equal(found, expected.to(ARENA_DTYPES[dtype]))


def _load_one(pieces: dict[str, list[BytesPiece]]) -> None:
    tensors = [_plain("w", (2, 3))]
    load_weights(tensors, pieces, torch.zeros(256, dtype=torch.uint8), "float32")


def test_pieces_that_do_not_fill_the_shape_are_refused() -> None:
    with pytest.raises(ArtifactError, match=r"tensor w \[2, 3\] needs 6 elements, its pieces hold 5"):
        _load_one({"w": [BytesPiece(_bytes(torch.zeros(5)), "F32")]})


def test_missing_and_surplus_tensors_are_refused() -> None:
    six = [BytesPiece(_bytes(torch.zeros(6)), "F32")]
    with pytest.raises(ArtifactError, match="tensor w is missing"):
        _load_one({})
    with pytest.raises(ArtifactError, match="tensor v is not expected"):
        _load_one({"w": six, "v": six})
