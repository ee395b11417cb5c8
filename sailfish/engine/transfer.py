"""Copies between host and device that do not make the host wait."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_RING = 4
"""Buffers in turn: of the steps in flight, two at most, each has its own."""

_COPY_WORDS = 1024
"""A step's words are sent in multiples of this many, so that few sizes occur."""


def upload(values: Any, device: torch.device, dtype: Any = np.int64) -> Tensor:
    """Return host numbers (a list or array) as a device tensor, through pinned memory on CUDA."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def download(tensor: Tensor) -> Tensor:
    """Return a host tensor that holds the values once the device has passed this point of its stream."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class _Pinned:
    """One buffer of a ring, and the point of the stream up to which the device uses it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.tensor = torch.zeros(shape, dtype=torch.int32, pin_memory=True)
        self.array: NDArray[np.int32] = self.tensor.numpy()
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]


class WordsUp:
    """32-bit words of the host and their copy at one place of the device."""

    def __init__(self, n_words: int, device: torch.device) -> None:
        self.device_words = torch.zeros(n_words, dtype=torch.int32, device=device)
        self._ring = [_Pinned((n_words,)) for _ in range(_RING)] if device.type == "cuda" else []
        self._at = 0
        self._views: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        """By buffer and number of words: the first ones, on the device and here."""

    def begin(self) -> NDArray[np.int32]:
        """Return words to write, which the device does not read any more."""
        if not self._ring:
            return self.device_words.numpy()
        self._at = (self._at + 1) % len(self._ring)
        self._ring[self._at].done.synchronize()
        return self._ring[self._at].array

    def send(self, begin: int, end: int) -> None:
        """Copy the words begin .. end of those written last, and maybe some after them."""
        if not self._ring:
            return
        pinned = self._ring[self._at]
        if begin:
            to, words = self.device_words[begin:end], pinned.tensor[begin:end]
        else:
            end += -end % _COPY_WORDS
            if (self._at, end) not in self._views:
                self._views[self._at, end] = (self.device_words[:end], pinned.tensor[:end])
            to, words = self._views[self._at, end]
        to.copy_(words, non_blocking=True)
        pinned.done.record()


class Pending:
    """Numbers on their way to the host."""

    def __init__(self, array: NDArray[np.int32], done: torch.cuda.Event | None) -> None:
        self._array = array
        self._done = done

    def wait(self) -> NDArray[np.int32]:
        """Wait for the device and return them; they last for as many steps as may be in flight."""
        if self._done is not None:
            self._done.synchronize()
        return self._array


class ArraysDown:
    """A small array of the device on its way to the host, as it was at a few steps in flight."""

    def __init__(self, numbers: Tensor) -> None:
        """Take the int32 numbers to copy."""
        self._numbers = numbers
        self._ring = [_Pinned(tuple(numbers.shape)) for _ in range(_RING)] if numbers.is_cuda else []
        self._at = 0

    def take(self, n: int) -> Pending:
        """Copy the first `n` from where the device's stream is now.

        All of them travel: a few KB more cost the device nothing, two views of tensors cost the host 4 us.
        """
        if not self._ring:
            return Pending(self._numbers[:n].clone().numpy(), None)
        self._at = (self._at + 1) % len(self._ring)
        pinned = self._ring[self._at]
        pinned.tensor.copy_(self._numbers, non_blocking=True)
        pinned.done.record()
        return Pending(pinned.array[:n], pinned.done)
