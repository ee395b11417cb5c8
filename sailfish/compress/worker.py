"""The process that quantises an engine's weights: `python -m sailfish.compress.worker`.

It takes a job on standard input and answers in lines on standard output. A process of its own, so that
whoever builds holds neither torch nor a GPU's memory afterwards.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from sailfish.artifact.manifest import Piece, TensorEntry, WeightFile
from sailfish.artifact.reader import StoredPiece
from sailfish.artifact.writer import WeightsWriter
from sailfish.base.errors import BuildError, SailfishError
from sailfish.checkpoint.formats.kept import StoredLinears
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.checkpoint.names import TensorSpec
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.compress import rtn
from sailfish.compress.job import Done, Failed, Job, Progress
from sailfish.compress.stored import stored_tensors
from sailfish.kernels import int4
from sailfish.models.load import load_weights
from sailfish.plan.formats import ArenaTensor, engine_specs, kind_of, parts
from sailfish.plan.types import Dtype, WeightFormat, WeightFormats

_FILE_BYTES = 4 << 30
_SPELLED = {torch.float32: "F32", torch.bfloat16: "BF16"}
_ERROR_ROWS_ELEMENTS = 1 << 22


def main() -> int:
    """Do the job on standard input; return the exit code."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    try:
        _say(quantise(job, lambda done, total: _say(Progress(done, total))))
    except SailfishError as error:
        _say(Failed(error.code, error.message, error.hint))
        return error.exit_code
    except OSError as error:
        failure = BuildError(f"writing the quantised weights failed: {error.strerror or error}")
        _say(Failed(failure.code, failure.message, "free some space, or choose a directory on another disk"))
        return failure.exit_code
    return 0


def quantise(job: Job, tell: Callable[[int, int], None]) -> Done:
    """Quantise weight after weight; the next one is made while the last one is hashed and written."""
    checkpoint = Checkpoint.open(Path(job.checkpoint))
    model = load_model_config(Path(job.checkpoint))
    stored = StoredLinears.of(checkpoint, model)
    specs = [
        (spec, to, stored if stored is not None and stored.holds(spec) else None)
        for spec, to in engine_specs(model, job.formats)
    ]
    specs = [(spec, to, linears) for spec, to, linears in specs if to != "plain" or linears is not None]
    total_bytes = sum(_source_bytes(checkpoint, spec) for spec, _, _ in specs)
    device = _device(job.may_use_gpu)
    errors: dict[str, list[float]] = {}
    done_bytes = 0
    with _Files(Path(job.out)) as files, ThreadPoolExecutor(1) as pool:
        written: Future[None] | None = None
        for spec, to, linears in specs:
            if linears is not None:
                tensors = stored_tensors(linears, spec, to, job.formats, job.dtype)
            else:
                try:
                    tensors, error = _quantised(checkpoint, spec, to, job.formats, device)
                except torch.OutOfMemoryError:  # others use the GPU; the CPU gives the same numbers
                    device = torch.device("cpu")
                    tensors, error = _quantised(checkpoint, spec, to, job.formats, device)
                errors.setdefault(kind_of(spec.name), []).append(error)
            if written is not None:
                written.result()
            written = pool.submit(files.append, spec, to, job.formats, tensors)
            done_bytes += _source_bytes(checkpoint, spec)
            tell(done_bytes, total_bytes)
        if written is not None:
            written.result()
        weights = files.entries()
    return Done(
        tensors=files.tensors,
        weights=weights,
        error={kind: sum(values) / len(values) for kind, values in errors.items()},
        device=device.type,
    )


def _quantised(
    checkpoint: Checkpoint, spec: TensorSpec, to: WeightFormat, formats: WeightFormats, device: torch.device
) -> tuple[list[Tensor], float]:
    """Return the tensors of a weight on the host, in the order of its parts, and its relative error."""
    weight_OI = _load(checkpoint, spec, device)
    try:
        if to == "int4":
            code, scale, zero = rtn.quantise_int4(weight_OI, formats.group)
            error = _relative_error(
                weight_OI, lambda rows: rtn.restore_int4(code[rows], scale[rows], zero, formats.group)
            )
            packed = int4.pack(code, scale, zero, torch.bfloat16, formats.layout)
            tensors = [packed.packed, packed.scale]
        else:
            assert to != "plain"
            values, row_scale = rtn.quantise_8(weight_OI, to)
            error = _relative_error(weight_OI, lambda rows: rtn.restore_8(values[rows], row_scale[rows]))
            tensors = [values, row_scale]
    except BuildError as error_:
        raise BuildError(
            f"{checkpoint.directory}: {spec.name} cannot be quantised: {error_.message}"
        ) from None
    return [tensor.contiguous().cpu() for tensor in tensors], error


def _load(checkpoint: Checkpoint, spec: TensorSpec, device: torch.device) -> Tensor:
    """Return the weight in the checkpoint's numbers, its sources' rows in the engine's order."""
    refs = [checkpoint.tensors[source] for source in spec.sources]
    pieces = [
        StoredPiece(
            path=checkpoint.directory / ref.file, offset=ref.offset, n_bytes=ref.n_bytes, dtype=ref.dtype
        )
        for ref in refs
    ]
    dtype: Dtype = "bfloat16" if all(ref.dtype == "BF16" for ref in refs) else "float32"
    tensor = ArenaTensor(name=spec.name, shape=spec.shape, dtype=None, run=spec.run)
    memory = torch.empty(tensor.n_bytes(dtype), dtype=torch.uint8, device=device)
    return load_weights([tensor], {spec.name: pieces}, memory, dtype)[spec.name]


def _relative_error(weight_OI: Tensor, restored: Callable[[slice], Tensor]) -> float:
    """Return ||W - Wq|| / ||W||, some rows at a time; 0 for a weight of zeros."""
    n_rows = max(1, _ERROR_ROWS_ELEMENTS // weight_OI.shape[1])
    wrong = norm = weight_OI.new_zeros((), dtype=torch.float64)
    for start in range(0, len(weight_OI), n_rows):
        rows = slice(start, start + n_rows)
        w = weight_OI[rows].float()
        wrong = wrong + (restored(rows) - w).square().sum(dtype=torch.float64)
        norm = norm + w.square().sum(dtype=torch.float64)
    return float((wrong / norm.clamp(min=1e-300)).sqrt())


class _Files:
    """Files of bounded size that tensors are appended to, each on a page of its own."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._stack = contextlib.ExitStack()
        self._writers: list[WeightsWriter] = []
        self.tensors: list[TensorEntry] = []

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def append(
        self, spec: TensorSpec, to: WeightFormat, formats: WeightFormats, tensors: list[Tensor]
    ) -> None:
        """Write the parts of one weight."""
        for part, tensor in zip(parts(spec, to, formats), tensors, strict=True):
            assert part.shape == tuple(tensor.shape)
            data = memoryview(tensor.flatten().view(torch.uint8).numpy().data)
            writer = self._writer(len(data))
            writer.align()
            offset = writer.append(data, lambda _: None)
            dtype = part.dtype or _SPELLED[tensor.dtype]
            piece = Piece(file=len(self._writers) - 1, offset=offset, n_bytes=len(data), dtype=dtype)
            self.tensors.append(
                TensorEntry(name=part.name, shape=part.shape, dtype=part.dtype, pieces=(piece,))
            )

    def entries(self) -> list[WeightFile]:
        """Describe all files."""
        return [writer.entry() for writer in self._writers]

    def _writer(self, n_bytes: int) -> WeightsWriter:
        if not self._writers or self._writers[-1].n_bytes + n_bytes > _FILE_BYTES:
            name = f"quantised-{len(self._writers) + 1:05d}.bin"
            self._writers.append(self._stack.enter_context(_durable(self._out / name)))
        return self._writers[-1]


@contextlib.contextmanager
def _durable(path: Path) -> Iterator[WeightsWriter]:
    with path.open("xb", buffering=0) as stream:
        yield WeightsWriter(path.name, stream)
        os.fsync(stream.fileno())


def _device(may_use_gpu: bool) -> torch.device:
    if may_use_gpu and torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type == "cuda":
            return accelerator
    return torch.device("cpu")


def _source_bytes(checkpoint: Checkpoint, spec: TensorSpec) -> int:
    """Return the bytes of a weight; of one that is stored in parts, what its numbers would take."""
    refs = [checkpoint.tensors.get(source) for source in spec.sources]
    return sum(ref.n_bytes for ref in refs if ref is not None) or 2 * prod(spec.shape)


def _say(message: Progress | Done | Failed) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
