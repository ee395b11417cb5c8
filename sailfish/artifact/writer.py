"""Writes an engine directory so that it appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from sailfish.artifact.manifest import (
    DIGEST_FILE,
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    WeightFile,
    check,
    digest,
    encode,
)
from sailfish.artifact.reader import Artifact, is_engine
from sailfish.base.errors import ArtifactError, BuildError
from sailfish.base.units import format_bytes

ALIGN_BYTES = 4096
"""Every tensor in the engine's own files begins on a page."""
_COPY_CHUNK_BYTES = 8 << 20
_LOCK_FILE = ".lock"
_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


class EngineWriter:
    """Fill a hidden directory beside `out` and rename it into place.

    The hidden directory holds a lock: a second builder is refused in one line, and what a killed
    builder left is cleared. On any failure nothing stays behind.
    """

    def __init__(self, out: Path, *, force: bool = False) -> None:
        self.out = Path(os.path.abspath(out))
        self._force = force
        self._staging = self.out.parent / f".{self.out.name}.partial"
        self._lock: int | None = None

    def __enter__(self) -> EngineWriter:
        self._refuse_existing()
        with self._told():
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
            for left_over in self._staging.iterdir():
                if left_over.name != _LOCK_FILE:
                    left_over.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._release()

    @property
    def staging(self) -> Path:
        """The hidden directory, for whoever writes files of the engine in another process."""
        return self._staging

    def add_file(self, name: str, data: bytes) -> FileEntry:
        """Write a small file."""
        with self._told(), self._create(name) as stream:
            stream.write(data)
        return FileEntry(name=name, n_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    @contextlib.contextmanager
    def weights(self, name: str) -> Iterator[WeightsWriter]:
        """Write a file of weights; it is durable when the context ends."""
        with self._told(), self._create(name) as stream:
            yield WeightsWriter(name, stream)

    def require_space(self, n_bytes: int) -> None:
        """Raise BuildError unless the disk has room for `n_bytes` more."""
        with self._told():
            free_bytes = shutil.disk_usage(self._staging).free
        if free_bytes < n_bytes:
            raise BuildError(
                f"{self.out} needs {format_bytes(n_bytes)}, its disk has {format_bytes(free_bytes)} free",
                hint="free some space, or build without --bundle",
            )

    def commit(self, manifest: Manifest) -> Artifact:
        """Write the manifest, make everything durable and rename it into place."""
        check(manifest, str(self.out / MANIFEST_FILE))
        data = encode(manifest)
        self.add_file(MANIFEST_FILE, data)
        self.add_file(DIGEST_FILE, f"{digest(data)}  {MANIFEST_FILE}\n".encode())
        self._refuse_existing()
        with self._told():
            (self._staging / _LOCK_FILE).unlink()
            _sync_directory(self._staging)
            self._rename()
            _sync_directory(self.out.parent)
        self._release()
        return Artifact.open(self.out)

    def _rename(self) -> None:
        if not self.out.exists():
            self._staging.rename(self.out)
            return
        old = self.out.parent / f".{self.out.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        self.out.rename(old)
        try:
            self._staging.rename(self.out)
        except OSError:
            old.rename(self.out)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def _refuse_existing(self) -> None:
        """`force` replaces an engine or an empty directory, never anything else."""
        if not self.out.exists() and not self.out.is_symlink():
            return
        is_empty = self.out.is_dir() and not self.out.is_symlink() and not any(self.out.iterdir())
        if is_empty:
            return
        if not self.out.is_dir() or self.out.is_symlink() or not is_engine(self.out):
            raise ArtifactError(f"{self.out} exists and is no engine directory", hint="choose another name")
        if not self._force:
            raise ArtifactError(
                f"{self.out} exists already", hint="choose another name, or replace it with --force"
            )

    def _acquire(self) -> None:
        while self._lock is None:
            self._staging.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # the other builder's rename came between
                self._try_lock()

    def _try_lock(self) -> None:
        path = self._staging / _LOCK_FILE
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_ino == path.stat().st_ino:
                self._lock, handle = handle, -1
        except BlockingIOError:
            raise ArtifactError(
                f"another build is writing {self.out}", hint="wait until it has ended"
            ) from None
        finally:
            if handle >= 0:
                os.close(handle)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def _create(self, name: str) -> Iterator[IO[bytes]]:
        with (self._staging / name).open("xb", buffering=0) as stream:
            yield stream
            os.fsync(stream.fileno())

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn an operating-system error into one line that names the engine."""
        try:
            yield
        except OSError as error:
            hints = {
                errno.ENOSPC: "free some space, or build without --bundle",
                errno.EDQUOT: "free some of your quota, or build without --bundle",
                errno.EROFS: "choose a directory on a writable disk",
                errno.EACCES: "choose a directory you may write to",
            }
            raise BuildError(
                f"writing the engine {self.out} failed: {error.strerror or error}",
                hint=hints.get(error.errno or 0),
            ) from None


class WeightsWriter:
    """One file of weights, hashed while it is written."""

    def __init__(self, name: str, stream: IO[bytes]) -> None:
        self._name = name
        self._stream = stream
        self._hash = hashlib.sha256()
        self.n_bytes = 0

    def align(self) -> None:
        """Pad with zeros so that what follows begins on a page."""
        self._write(memoryview(bytes(-self.n_bytes % ALIGN_BYTES)))

    def append(self, data: memoryview, on_written: Callable[[int], None]) -> int:
        """Write bytes and return the offset they begin at; `on_written` is told the bytes of each write."""
        offset = self.n_bytes
        for start in range(0, len(data), _COPY_CHUNK_BYTES):
            chunk = data[start : start + _COPY_CHUNK_BYTES]
            self._write(chunk)
            on_written(len(chunk))
        return offset

    def entry(self) -> WeightFile:
        """Describe the file as written so far."""
        return WeightFile(
            path=self._name,
            is_source=False,
            n_bytes=self.n_bytes,
            header_bytes=0,
            header_sha256=_EMPTY_SHA256,
            sha256=self._hash.hexdigest(),
        )

    def _write(self, data: memoryview) -> None:
        self._stream.write(data)
        self._hash.update(data)
        self.n_bytes += len(data)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
