"""Has an engine's weights quantised in a process of its own, so that this one needs no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import msgspec

from sailfish.base.errors import BuildError, SailfishError, error_from_code
from sailfish.base.sources import environment
from sailfish.compress.job import Done, Failed, Job, Progress
from sailfish.plan.types import Dtype, WeightFormats

_decoder = msgspec.json.Decoder(Progress | Done | Failed)


class Quantiser:
    """A process that quantises, from entering the context on; it ends with the context at the latest."""

    def __init__(
        self, checkpoint: Path, out: Path, formats: WeightFormats, *, dtype: Dtype, may_use_gpu: bool
    ) -> None:
        """Name what to quantise, the directory that its files go to, and the dtype of restored weights."""
        self._job = Job(
            checkpoint=str(checkpoint), out=str(out), formats=formats, dtype=dtype, may_use_gpu=may_use_gpu
        )
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Quantiser:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sailfish.compress.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=dict(environment()),
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(self._job))
        self._process.stdin.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None and self._process.stdout is not None
        self._process.kill()
        self._process.stdout.close()
        self._process.wait()

    def finish(self, tell: Callable[[int, int], None]) -> Done:
        """Wait for the end, telling (bytes done, bytes in all); raises what the process says is wrong."""
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            match _decoder.decode(line):
                case Progress(done_bytes=done_bytes, total_bytes=total_bytes):
                    tell(done_bytes, total_bytes)
                case Failed(code=code, message=message, hint=hint):
                    error: SailfishError = error_from_code(code, message)
                    error.hint = hint
                    raise error
                case Done() as done:
                    self._process.wait()
                    return done
        raise BuildError(
            f"the process that quantises the weights ended with status {self._process.wait()}",
            hint="its standard error says more; it may have run out of memory",
        )
