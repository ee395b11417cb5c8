"""Open a directory of safetensors files: headers checked to the byte, tensor data mapped only when asked for.

Format: https://github.com/huggingface/safetensors (8 bytes little-endian header length, JSON header, data).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sailfish.base.errors import CheckpointError
from sailfish.checkpoint.files import DOWNLOAD_AGAIN, file_size, parse_object, read_json, shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 16
MAX_DIM = 2**48

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_FOREIGN_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".npz")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRef:
    """Where one tensor lies."""

    name: str
    file: str
    """Name of the file, relative to the checkpoint's directory."""
    dtype: str
    """As safetensors spells it: "F32", "BF16", ..."""
    shape: tuple[int, ...]
    offset: int
    """First byte, counted from the start of the file."""
    n_bytes: int


class Checkpoint:
    """A checkpoint's tensors by name. Opening reads headers only."""

    def __init__(
        self, directory: Path, tensors: Mapping[str, TensorRef], file_bytes: Mapping[str, int]
    ) -> None:
        self.directory = directory
        self.tensors = dict(tensors)
        self.file_bytes = dict(file_bytes)
        """Size of each file, by its name."""
        self._maps: dict[str, mmap.mmap] = {}

    @classmethod
    def open(cls, directory: Path | str) -> Checkpoint:
        """Read every header of a directory with one or many safetensors files, or raise CheckpointError."""
        directory = Path(directory)
        if _is_there(directory / SINGLE_FILE):
            tensors = read_header(directory / SINGLE_FILE)
            return cls(directory, tensors, {SINGLE_FILE: file_size(directory / SINGLE_FILE)})
        if _is_there(directory / INDEX_FILE):
            return _open_sharded(directory)
        raise _no_weights(directory)

    def bytes(self, name: str) -> memoryview:
        """Return one tensor's bytes, read from the file as they are touched."""
        ref = self.tensors[name]
        if ref.n_bytes == 0:
            return memoryview(b"")
        return memoryview(self._map(ref.file))[ref.offset : ref.offset + ref.n_bytes]

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            path = self.directory / file
            size = file_size(path)
            if size != self.file_bytes[file]:
                raise CheckpointError(
                    f"{path} had {self.file_bytes[file]} bytes when it was opened and has {size} now",
                    hint="do not change a checkpoint while it is read",
                )
            with path.open("rb") as stream:
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]


def _is_there(path: Path) -> bool:
    """Say whether there is a file of this name, even a link to nothing: reading it then names the link."""
    return path.exists() or path.is_symlink()


def read_header(path: Path) -> dict[str, TensorRef]:
    """Return the tensors that one safetensors file declares, or raise CheckpointError."""
    size = file_size(path)
    try:
        with path.open("rb") as stream:
            prefix = stream.read(8)
            n_header = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or n_header > size - 8:
                raise CheckpointError(
                    f"{path} is truncated: it has {size} bytes and its header alone needs {8 + n_header}",
                    hint=DOWNLOAD_AGAIN,
                )
            if n_header > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: the header has {n_header} bytes, at most {MAX_HEADER_BYTES} are read"
                )
            raw = stream.read(n_header)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}", hint="check its permissions"
        ) from None
    if raw[:1] != b"{":
        raise CheckpointError(
            f"{path} is not a safetensors file: its header does not start with '{{'", hint=DOWNLOAD_AGAIN
        )
    header = parse_object(raw, f"{path}: header")
    _check_metadata(header.pop("__metadata__", {}), path)
    tensors = {name: _tensor(name, entry, path, 8 + n_header) for name, entry in header.items()}
    _check_layout(tensors, path, 8 + n_header, size)
    return tensors


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")


def _tensor(name: str, entry: Any, path: Path, data_start: int) -> TensorRef:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where} has dtype {shown(dtype)}; known are {', '.join(DTYPE_BITS)}")
    if not _is_int_list(shape, MAX_DIM) or len(shape) > MAX_RANK:
        raise CheckpointError(f"{where} has shape {shown(shape)}; it must be a list of sizes >= 0")
    if not _is_int_list(offsets, 2**63) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {shown(offsets)}; they must be [begin, end]")
    begin, end = offsets
    n_bits = math.prod(shape) * DTYPE_BITS[dtype]
    if n_bits != (end - begin) * 8:
        raise CheckpointError(
            f"{where} has {end - begin} bytes, but {dtype} of shape {shown(shape)} needs {-(-n_bits // 8)}",
            hint=DOWNLOAD_AGAIN,
        )
    return TensorRef(
        name=name,
        file=path.name,
        dtype=dtype,
        shape=tuple(shape),
        offset=data_start + begin,
        n_bytes=end - begin,
    )


def _is_int_list(value: Any, high: int) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= high for item in value)


def _check_layout(tensors: Mapping[str, TensorRef], path: Path, data_start: int, size: int) -> None:
    """Data must be covered exactly once: nothing past the end, no overlap, no hole."""
    end, before = data_start, "the header"
    for ref in sorted(tensors.values(), key=lambda ref: (ref.offset, ref.n_bytes)):
        if ref.offset + ref.n_bytes > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {shown(ref.name)} ends at byte {ref.offset + ref.n_bytes} "
                f"of a file of {size}",
                hint=DOWNLOAD_AGAIN,
            )
        if ref.offset != end:
            kind = "overlaps" if ref.offset < end else "leaves a hole after"
            raise CheckpointError(
                f"{path}: tensor {shown(ref.name)} {kind} {before} (byte {ref.offset}, not {end})",
                hint=DOWNLOAD_AGAIN,
            )
        end, before = ref.offset + ref.n_bytes, shown(ref.name)
    if end != size:
        raise CheckpointError(f"{path} has {size - end} bytes after its last tensor", hint=DOWNLOAD_AGAIN)


def _open_sharded(directory: Path) -> Checkpoint:
    index = directory / INDEX_FILE
    weight_map = read_json(index, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} lacks weight_map, which must map tensor names to files")
    listed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not _is_shard_name(file):
            raise CheckpointError(
                f"{index}: tensor {shown(name)} is in {shown(file)}; "
                "shards are *.safetensors files in the same directory"
            )
        listed.setdefault(file, set()).add(name)
    tensors: dict[str, TensorRef] = {}
    for file in sorted(listed):
        found = read_header(directory / file)
        _check_shard(index, file, listed[file], found.keys())
        tensors |= found
    return Checkpoint(directory, tensors, {file: file_size(directory / file) for file in listed})


def _is_shard_name(file: Any) -> bool:
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and not set(file) & set("/\\:\0")
        and file[0] != "."
    )


def _check_shard(index: Path, file: str, listed: set[str], found: Any) -> None:
    if missing := sorted(listed - found):
        raise CheckpointError(
            f"{index} places tensor {shown(missing[0])} in {file}, which does not hold it",
            hint=DOWNLOAD_AGAIN,
        )
    if extra := sorted(found - listed):
        raise CheckpointError(
            f"{file} holds tensor {shown(extra[0])}, which {index} does not place there",
            hint="rewrite the checkpoint with save_pretrained",
        )


def _no_weights(directory: Path) -> CheckpointError:
    if not directory.is_dir():
        return CheckpointError(f"{directory} is not a directory", hint="give the directory of a checkpoint")
    foreign = sorted(path.name for path in directory.iterdir() if path.suffix in _FOREIGN_SUFFIXES)
    if foreign:
        return CheckpointError(
            f"{directory} holds {shown(foreign[0])} but no safetensors; other formats are never loaded",
            hint="convert it: AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir)",
        )
    return CheckpointError(
        f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}",
        hint="give the directory that holds a checkpoint's config.json and weights",
    )
