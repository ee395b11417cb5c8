"""Fill the weight arena from pieces of files, converting dtypes on the way without a second full copy."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sailfish.base.errors import ArtifactError
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.kernels.contract import Weight8
from sailfish.kernels.int4 import Int4Weight
from sailfish.kernels.reference.quantised import EIGHT_BITS
from sailfish.models.arena import arena_layout
from sailfish.models.layers.linear import LinearWeight, OrderedInt4
from sailfish.plan.formats import ArenaTensor, engine_specs, int4_sizes
from sailfish.plan.types import Dtype, WeightFormats

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""What a piece may hold, as safetensors spells it."""
ARENA_DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CACHE_DTYPES = ARENA_DTYPES | EIGHT_BITS
"""What keys and values may be cached in, by the plan's names."""
_STAGING_BYTES = 8 << 20
_N_LANES = 8
"""Threads that read for a GPU. One copies about 6 GB/s out of the page cache, PCIe takes 50 GB/s."""


class Piece(Protocol):
    """Consecutive elements of a tensor, in a file."""

    @property
    def n_bytes(self) -> int:
        """Its size as it is stored."""

    @property
    def dtype(self) -> str:
        """As safetensors spells it."""

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill the buffer with the bytes from `start`; may be called from any thread."""


def load_weights(
    tensors: Sequence[ArenaTensor], pieces: Mapping[str, Sequence[Piece]], arena: Tensor, dtype: Dtype
) -> dict[str, Tensor]:
    """Copy every tensor, the pieces of its name one after the other or its halves in turns, into `arena`.

    `arena` is uint8 on any device, laid out by `arena_layout`; views of it are returned by name. Raises
    ArtifactError if the pieces do not fill a shape, or names differ.
    """
    if surplus := pieces.keys() - {tensor.name for tensor in tensors}:
        raise ArtifactError(f"tensor {min(surplus)} is not expected", hint="build the engine again")
    offsets, _ = arena_layout(tensors, dtype)
    loaded: dict[str, Tensor] = {}
    copies: list[_Copy] = []
    for tensor in tensors:
        to = ARENA_DTYPES[dtype] if tensor.dtype is None else DTYPES[tensor.dtype]
        begin = offsets[tensor.name]
        flat = arena[begin : begin + prod(tensor.shape) * to.itemsize].view(to)
        loaded[tensor.name] = flat.view(tensor.shape)
        copies += _copies(tensor, pieces.get(tensor.name), _runs(flat, tensor))
    _run(copies, arena.device)
    return loaded


def assemble(
    model: ModelConfig, formats: WeightFormats, tensors: Mapping[str, Tensor]
) -> dict[str, LinearWeight]:
    """Return the model's weights by name, quantised ones made of their tensors."""
    weights: dict[str, LinearWeight] = {}
    for spec, format in engine_specs(model, formats):
        name = spec.name
        if format == "plain":
            weights[name] = tensors[name]
        elif format == "int4":
            n_out, n_in = spec.shape
            int4 = Int4Weight(
                packed=tensors[f"{name}.packed"],
                scale=tensors[f"{name}.scale"],
                zero=tensors.get(f"{name}.zero"),
                n_out=n_out,
                n_in=n_in,
                group=int4_sizes(n_out, n_in, formats.group)[2],
                layout=formats.layout,
            )
            order_I = tensors.get(f"{name}.order")
            weights[name] = int4 if order_I is None else OrderedInt4(int4, order_I)
        else:
            values, scale = tensors[f"{name}.values"], tensors[f"{name}.scale"]
            weights[name] = Weight8(values, scale, tensors.get(f"{name}.input_scale"))
    return weights


class _Copy(NamedTuple):
    """Some bytes of a piece, and the part of the arena that they fill."""

    piece: Piece
    start: int
    n_bytes: int
    to: Tensor
    """Elements that follow each other, or several runs of them."""


def _runs(flat: Tensor, tensor: ArenaTensor) -> Tensor:
    """Return the tensor's elements [halves, runs of a half, elements of a run], as they are read."""
    if not tensor.run:
        return flat.view(1, 1, -1)
    n_elements = tensor.run * prod(tensor.shape[1:])
    return flat.view(-1, 2, n_elements).transpose(0, 1)


def _copies(tensor: ArenaTensor, pieces: Sequence[Piece] | None, runs: Tensor) -> Iterator[_Copy]:
    if pieces is None:
        raise ArtifactError(f"tensor {tensor.name} is missing", hint="build the engine again")
    n_found = sum(piece.n_bytes // DTYPES[piece.dtype].itemsize for piece in pieces)
    if n_found != runs.numel():
        raise ArtifactError(
            f"tensor {tensor.name} {list(tensor.shape)} needs {runs.numel()} elements, "
            f"its pieces hold {n_found}",
            hint="build the engine again",
        )
    begin = 0
    for piece in pieces:
        item_bytes = DTYPES[piece.dtype].itemsize
        start = 0
        while start < piece.n_bytes:
            to = _room(runs, begin, min(_STAGING_BYTES, piece.n_bytes - start) // item_bytes)
            yield _Copy(piece, start, to.numel() * item_bytes, to)
            start, begin = start + to.numel() * item_bytes, begin + to.numel()


def _room(runs: Tensor, begin: int, n: int) -> Tensor:
    """Return where elements from `begin` on go: at most n, the rest of a run or whole runs of a half."""
    _, n_runs, n_elements = runs.shape
    run, offset = divmod(begin, n_elements)
    half, run = divmod(run, n_runs)
    if offset or n < n_elements:
        return runs[half, run, offset : offset + n]
    return runs[half, run : run + n // n_elements]


def _run(copies: list[_Copy], device: torch.device) -> None:
    if device.type == "cpu":
        staging = torch.empty(_STAGING_BYTES, dtype=torch.uint8)
        for copy in copies:
            _copy_on_cpu(copy, staging)
        return
    lock, left = threading.Lock(), iter(copies)

    def following() -> _Copy | None:
        with lock:
            return next(left, None)

    def work(lane: _Lane) -> None:
        while copy := following():
            lane.copy(copy)
        lane.finish()

    with ThreadPoolExecutor(_N_LANES) as pool:
        list(pool.map(work, [_Lane(device) for _ in range(_N_LANES)]))


def _copy_on_cpu(copy: _Copy, staging: Tensor) -> None:
    source = DTYPES[copy.piece.dtype]
    is_final = copy.to.dtype == source and copy.to.is_contiguous()
    raw = copy.to.flatten().view(torch.uint8) if is_final else staging[: copy.n_bytes]
    copy.piece.read_into(raw.numpy().data, copy.start)
    if not is_final:
        copy.to.copy_(raw.view(source).view(copy.to.shape))


class _Lane:
    """Reads into one of two pinned buffers while the other one is on its way to the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._sent = [torch.Event(device) for _ in range(2)]
        self._turn = 0
        self._on_device: Tensor | None = None
        """Bytes of another dtype than the arena's, or of several runs, before they go to their place."""

    def copy(self, copy: _Copy) -> None:
        """Read, and have the device take it when it gets there."""
        self._turn ^= 1
        buffer, sent = self._buffers[self._turn][: copy.n_bytes], self._sent[self._turn]
        sent.synchronize()
        copy.piece.read_into(buffer.numpy().data, copy.start)
        source = DTYPES[copy.piece.dtype]
        if source == copy.to.dtype and copy.to.is_contiguous():
            copy.to.copy_(buffer.view(source).view(copy.to.shape), non_blocking=True)
        else:
            if self._on_device is None:
                self._on_device = torch.empty(_STAGING_BYTES, dtype=torch.uint8, device=self._device)
            raw = self._on_device[: copy.n_bytes]
            raw.copy_(buffer, non_blocking=True)
            copy.to.copy_(raw.view(source).view(copy.to.shape))
        sent.record()

    def finish(self) -> None:
        """Wait until the device has all."""
        for sent in self._sent:
            sent.synchronize()
