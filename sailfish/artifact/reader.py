"""Opens an engine directory: sizes and header digests at once, the weights on demand."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sailfish.artifact.manifest import (
    DIGEST_FILE,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    Manifest,
    WeightFile,
    decode,
    digest,
)
from sailfish.base.errors import ArtifactError

_HASH_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPiece:
    """Rows of a tensor as they are stored, read from the file when asked for."""

    path: Path
    offset: int
    n_bytes: int
    dtype: str
    """As safetensors spells it."""

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill the buffer with the piece's bytes from `start`; may be called from any thread."""
        offset = self.offset + start
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while len(buffer) and (n_bytes := os.preadv(handle, [buffer], offset)):
                    buffer, offset = buffer[n_bytes:], offset + n_bytes
            finally:
                os.close(handle)
        except OSError as error:
            raise ArtifactError(f"{self.path} cannot be read: {error.strerror}") from None
        if len(buffer):
            raise _changed(self.path, f"it ends at byte {offset}")

    def read(self) -> bytes:
        """Return all of the piece's bytes."""
        data = bytearray(self.n_bytes)
        self.read_into(memoryview(data), 0)
        return bytes(data)


class StoredTensor(NamedTuple):
    """One canonical tensor; its pieces follow each other along the first axis."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCheck:
    """One file's full digest against the manifest's."""

    path: Path
    n_bytes: int
    is_intact: bool


class Artifact:
    """An opened engine directory. Nothing in it changes but side files."""

    def __init__(self, directory: Path, manifest: Manifest, engine_digest: str) -> None:
        self.directory = directory
        self.manifest = manifest
        self.digest = engine_digest

    @classmethod
    def open(cls, directory: Path | str) -> Artifact:
        """Open an engine directory; raises ArtifactError when it is no engine, damaged, or its source moved.

        Reads the manifest, the small files and the headers of the weight files; `verify` reads it all.
        """
        directory = Path(directory)
        data = _read_manifest(directory)
        engine_digest = _check_digest(directory, data)
        artifact = cls(directory, decode(data, str(directory / MANIFEST_FILE)), engine_digest)
        for entry in artifact.manifest.files:
            content = _read(directory / entry.name, entry.n_bytes, may_link=False)
            if hashlib.sha256(content).hexdigest() != entry.sha256:
                raise _changed(directory / entry.name, "its digest differs")
        for file in artifact.manifest.weights:
            artifact._check_weights(file)
        return artifact

    def weight_path(self, file: WeightFile) -> Path:
        """Return where a weight file is."""
        return self.directory / file.path

    def tensors(self) -> Iterator[StoredTensor]:
        """Yield every tensor in the manifest's order; nothing is read yet."""
        paths = [self.weight_path(file) for file in self.manifest.weights]
        for tensor in self.manifest.tensors:
            pieces = tuple(
                StoredPiece(
                    path=paths[piece.file], offset=piece.offset, n_bytes=piece.n_bytes, dtype=piece.dtype
                )
                for piece in tensor.pieces
            )
            yield StoredTensor(tensor.name, tensor.shape, pieces)

    def verify(self, on_progress: Callable[[int, int], None] | None = None) -> list[FileCheck]:
        """Read every byte and compare full digests; the manifest itself was checked by `open`.

        `on_progress` is told (bytes done, bytes in all).
        """
        expected = [(self.weight_path(file), file.n_bytes, file.sha256) for file in self.manifest.weights]
        expected += [(self.directory / file.name, file.n_bytes, file.sha256) for file in self.manifest.files]
        total_bytes = sum(n_bytes for _, n_bytes, _ in expected)
        checks, done_bytes = [], 0

        def count(n_bytes: int) -> None:
            nonlocal done_bytes
            done_bytes += n_bytes
            if on_progress is not None:
                on_progress(done_bytes, total_bytes)

        for path, n_bytes, sha256 in expected:
            checks.append(FileCheck(path=path, n_bytes=n_bytes, is_intact=file_digest(path, count) == sha256))
        return checks

    def _check_weights(self, file: WeightFile) -> None:
        path = self.weight_path(file)
        header = _read(path, file.n_bytes, may_link=file.is_source, n_read=file.header_bytes)
        if hashlib.sha256(header).hexdigest() != file.header_sha256:
            raise _changed(path, "the digest of its header differs")


def is_engine(directory: Path) -> bool:
    """Say whether a directory looks like an engine, sound or not."""
    return (directory / MANIFEST_FILE).is_file()


def header_digest(path: Path) -> tuple[int, str]:
    """Return the length of a safetensors file's header, its 8 bytes of length included, and its SHA-256."""
    try:
        with path.open("rb") as stream:
            prefix = stream.read(8)
            data = prefix + stream.read(int.from_bytes(prefix, "little"))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None
    return len(data), hashlib.sha256(data).hexdigest()


def file_digest(path: Path, on_read: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file in hex; `on_read` is told the bytes of each read."""
    state = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as stream:
            buffer = bytearray(_HASH_CHUNK_BYTES)
            while n_bytes := stream.readinto(buffer):
                state.update(memoryview(buffer)[:n_bytes])
                if on_read is not None:
                    on_read(n_bytes)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None
    return state.hexdigest()


def _read_manifest(directory: Path) -> bytes:
    path = directory / MANIFEST_FILE
    if not path.is_file():
        if (directory / "config.json").is_file():
            hint = f"it is a checkpoint: build it with `sailfish build {directory} -o ENGINE`"
        else:
            hint = "build one with `sailfish build CHECKPOINT -o ENGINE`"
        raise ArtifactError(f"{directory} is no engine directory, it has no {MANIFEST_FILE}", hint=hint)
    try:
        n_bytes = path.stat().st_size
        if n_bytes > MAX_MANIFEST_BYTES:
            raise ArtifactError(f"{path} has {n_bytes} bytes, at most {MAX_MANIFEST_BYTES} are read")
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None


def _check_digest(directory: Path, data: bytes) -> str:
    path = directory / DIGEST_FILE
    try:
        words = path.read_bytes()[:256].split()
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror}", hint="build the engine again"
        ) from None
    found = digest(data)
    if words != [found.encode(), MANIFEST_FILE.encode()]:
        raise ArtifactError(
            f"{directory / MANIFEST_FILE} is damaged: its digest is not the one in {DIGEST_FILE}",
            hint="build the engine again",
        )
    return found


def _read(path: Path, n_bytes: int, *, may_link: bool, n_read: int | None = None) -> bytes:
    """Return the first `n_read` bytes (None: all) of a regular file that must have `n_bytes`."""
    try:
        status = path.stat() if may_link else path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"{path} is not a regular file", hint="build the engine again")
        if status.st_size != n_bytes:
            raise _changed(path, f"it has {status.st_size} bytes, the manifest says {n_bytes}")
        with path.open("rb") as stream:
            return stream.read(n_bytes if n_read is None else n_read)
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} is gone, and the engine needs it",
            hint="put it back, or build the engine again; --bundle makes one that needs no other file",
        ) from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None


def _changed(path: Path, how: str) -> ArtifactError:
    return ArtifactError(
        f"{path} is not what the engine was built from: {how}", hint="build the engine again"
    )
