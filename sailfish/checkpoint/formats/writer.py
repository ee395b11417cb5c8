"""Writes a checkpoint's directory: tensors one after the other into safetensors files, then config.json.

Nothing stands under the directory's name before all of it is written.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sailfish.base.errors import ConfigError
from sailfish.checkpoint.files import shown
from sailfish.checkpoint.formats.tensors import StoredTensor
from sailfish.checkpoint.safetensors_reader import DTYPE_BITS, INDEX_FILE, SINGLE_FILE, TensorRef

MAX_SHARD_BYTES = 2 << 30
"""Tensors are held until a file of so many bytes is full."""
_ALIGNMENT = 8


class CheckpointWriter:
    """A checkpoint in the making; leaving the context without `finish` leaves nothing behind."""

    def __init__(self, directory: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Name the directory to be made; ConfigError where there is something of its name already."""
        if directory.exists() or directory.is_symlink():
            raise ConfigError(f"{directory} exists already", hint="name a directory that does not")
        self._directory = directory
        self._partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
        self._max_shard_bytes = max_shard_bytes
        self._held: dict[str, tuple[str, tuple[int, ...], memoryview]] = {}
        self._held_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()

    def __enter__(self) -> CheckpointWriter:
        try:
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"{self._directory} cannot be made: {error.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, name: str, tensor: StoredTensor) -> None:
        """Add a tensor; its array is read when its file is full, so it must not change until then."""
        self._add(name, tensor.dtype, tensor.array.shape, tensor.array.ravel().view(np.uint8).data)

    def copy(self, ref: TensorRef, data: memoryview) -> None:
        """Add a tensor of another checkpoint as it is."""
        self._add(ref.name, ref.dtype, ref.shape, data)

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Write what is left and the small files (config.json, tokenizer, ...), and give all its name."""
        self._flush()
        n_shards = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = _shard_name(number, n_shards)
            (self._partial / str(number)).rename(self._partial / file)
            weight_map |= dict.fromkeys(names, file)
        if n_shards > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            files = {**files, INDEX_FILE: json.dumps(index, indent=2, sort_keys=True).encode()}
        for name, data in files.items():
            (self._partial / name).write_bytes(data)
        self._partial.rename(self._directory)

    def _add(self, name: str, dtype: str, shape: tuple[int, ...], data: memoryview) -> None:
        if name in self._names:
            raise ConfigError(f"tensor {shown(name)} would be written twice")
        assert math.prod(shape) * DTYPE_BITS[dtype] == len(data) * 8, name
        if self._held and self._held_bytes + len(data) > self._max_shard_bytes:
            self._flush()
        self._names.add(name)
        self._held[name] = dtype, shape, data
        self._held_bytes += len(data)
        self._total_bytes += len(data)

    def _flush(self) -> None:
        if not self._held and self._shards:
            return
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # Wide types first, so that each tensor lies at a multiple of its type's size.
        names = sorted(self._held, key=lambda name: (-DTYPE_BITS[self._held[name][0]], name))
        for name in names:
            dtype, shape, data = self._held[name]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
            offset += len(data)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        with (self._partial / str(len(self._shards))).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                stream.write(self._held[name][2])
        self._shards.append(names)
        self._held, self._held_bytes = {}, 0


def _shard_name(number: int, n_shards: int) -> str:
    return SINGLE_FILE if n_shards == 1 else f"model-{number + 1:05d}-of-{n_shards:05d}.safetensors"
