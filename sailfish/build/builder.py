"""Builds an engine directory from a checkpoint: plan, choose, refer to the weights or copy them, commit."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec

from sailfish.artifact.manifest import FileEntry, Manifest, Piece, TensorEntry, WeightFile
from sailfish.artifact.reader import Artifact, file_digest, header_digest, is_engine
from sailfish.artifact.side import WEIGHT_ERROR, append_evidence
from sailfish.artifact.writer import ALIGN_BYTES, EngineWriter
from sailfish.base.config import EngineConfig
from sailfish.base.errors import CheckpointError
from sailfish.base.sources import environment
from sailfish.build.quantise import Quantiser
from sailfish.checkpoint.files import read_bytes
from sailfish.checkpoint.formats.kept import StoredLinears
from sailfish.checkpoint.hf_config import load_generation_defaults, load_model_config
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.checkpoint.names import TensorSpec, check_tensors, tensor_specs
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.checkpoint.tokenizer import Tokenizer
from sailfish.compress.job import Done, method
from sailfish.hardware.probe import find_gpu, probe, profile_of_gpu
from sailfish.hardware.profile import HardwareProfile, profile
from sailfish.plan import make_plan
from sailfish.plan.formats import arena_tensors, engine_specs, is_quantised
from sailfish.plan.ops import choose_ops
from sailfish.plan.strict import refuse_downgrades
from sailfish.plan.types import Plan
from sailfish.version import __version__

Progress = Callable[[str, int, int], None]
"""Told (stage, bytes done, bytes in all)."""

COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Small files that come along where the checkpoint has them; the first must be there."""
_MAX_COPIED_BYTES = 256 << 20
_MAX_WEIGHT_FILE_BYTES = 4 << 30
_HASH_THREADS = 4
_HUB_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+")
_BLOB = re.compile(r"[0-9a-f]{64}")


def build_engine(
    checkpoint_dir: Path | str,
    out_dir: Path | str,
    *,
    config: EngineConfig | None = None,
    planned_for: EngineConfig | None = None,
    target: str | None = None,
    bundle: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    environ: Mapping[str, str] | None = None,
) -> Artifact:
    """Build an engine for `target` ("cpu", "sm_90", ...; None: this machine) and return it opened.

    `config` stays in the engine as what it was built to do; every start may overrule it. The recorded
    plan is for `planned_for` where that is given. Weights stay where they are, named by path, size and
    digests; `bundle` copies them in, and where some are quantised all are in any case. `force` replaces
    an engine of that name. Raises CheckpointError, PlanError, ArtifactError or BuildError; then nothing
    is left behind.
    """
    config, tell = config or EngineConfig(), progress or _silent
    directory, out = Path(os.path.abspath(checkpoint_dir)), Path(os.path.abspath(out_dir))
    if is_engine(directory):
        raise CheckpointError(f"{directory} is an engine already", hint="serve it as it is")
    checkpoint = Checkpoint.open(directory)
    model = load_model_config(directory)
    generation, _, _ = load_generation_defaults(directory)
    check_tensors(model, checkpoint)
    Tokenizer.load(directory)  # refused now rather than at the engine's first start
    hardware = target_profile(target, config.device, environ if environ is not None else environment())
    plan = make_plan(planned_for or config, model, hardware)
    ops = choose_ops(model, plan)
    refuse_downgrades(planned_for or config, plan, ops)
    evidence: Done | None = None
    with EngineWriter(out, force=force) as writer:
        if is_quantised(plan.formats) or model.stored is not None:
            may_use_gpu = config.device != "cpu"
            tensors, weights, evidence = _quantised(writer, model, checkpoint, plan, may_use_gpu, tell)
        elif bundle:
            tensors, weights = _copied(writer, tensor_specs(model), checkpoint, tell)
        else:
            tensors, weights = _referenced(out, model, checkpoint, tell)
        manifest = Manifest(
            producer=f"sailfish {__version__}",
            name=model_name(directory),
            model=model,
            generation=generation,
            target=hardware.target,
            requested=config,
            plan=plan,
            ops=ops,
            quantised_by=method(plan.formats, model.stored) if is_quantised(plan.formats) else None,
            tensors=tensors,
            weights=weights,
            files=_copy_files(writer, directory),
        )
        artifact = writer.commit(manifest)
    if evidence is not None and evidence.error:
        _remember(artifact, evidence)
    return artifact


def target_profile(target: str | None, device: str | None, environ: Mapping[str, str]) -> HardwareProfile:
    """Return the profile to plan for: of this machine where it is the target, else a row of the table."""
    if target is None:
        return probe(device, environ=environ)
    if target == "cpu":
        return probe("cpu")
    gpu, _ = find_gpu(environ)
    here = profile_of_gpu(gpu) if gpu is not None else None
    return here if here is not None and here.target == target else profile(target)


def model_name(directory: Path) -> str:
    """Return what a checkpoint is called: `org/name` inside a Hub cache, else its directory's name."""
    match = _HUB_SNAPSHOT.search(directory.as_posix())
    return f"{match[1]}/{match[2]}" if match else directory.name


def _referenced(
    out: Path, model: ModelConfig, checkpoint: Checkpoint, tell: Progress
) -> tuple[tuple[TensorEntry, ...], tuple[WeightFile, ...]]:
    """Name the checkpoint's files; several are hashed at once."""
    files = sorted(checkpoint.file_bytes)
    index = {file: i for i, file in enumerate(files)}
    count = _counter(tell, "digest", sum(checkpoint.file_bytes.values()))
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        weights = tuple(pool.map(lambda file: _source(out, checkpoint, file, count), files))
    tensors = tuple(
        TensorEntry(
            name=spec.name,
            shape=spec.shape,
            dtype=None,
            pieces=tuple(
                Piece(file=index[ref.file], offset=ref.offset, n_bytes=ref.n_bytes, dtype=ref.dtype)
                for ref in (checkpoint.tensors[source] for source in spec.sources)
            ),
        )
        for spec in tensor_specs(model)
    )
    return tensors, weights


def _source(out: Path, checkpoint: Checkpoint, file: str, count: Callable[[int], None]) -> WeightFile:
    """Describe one safetensors file. A Hub cache names its blobs by digest, so they need no reading."""
    path = checkpoint.directory / file
    n_bytes = checkpoint.file_bytes[file]
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs" and _BLOB.fullmatch(blob.name):
        sha256 = blob.name
        count(n_bytes)
    else:
        sha256 = file_digest(path, count)
    header_bytes, header_sha256 = header_digest(path)
    return WeightFile(
        path=_path_from(out, path),
        is_source=True,
        n_bytes=n_bytes,
        header_bytes=header_bytes,
        header_sha256=header_sha256,
        sha256=sha256,
    )


def _quantised(
    writer: EngineWriter,
    model: ModelConfig,
    checkpoint: Checkpoint,
    plan: Plan,
    may_use_gpu: bool,
    tell: Progress,
) -> tuple[tuple[TensorEntry, ...], tuple[WeightFile, ...], Done]:
    """Copy the plain tensors while another process quantises the others, or reads those that are already."""
    stored = StoredLinears.of(checkpoint, model)
    plain = [
        spec
        for spec, format in engine_specs(model, plan.formats)
        if format == "plain" and (stored is None or not stored.holds(spec))
    ]
    wanted = arena_tensors(model, plan.formats)
    writer.require_space(sum(tensor.n_bytes("float32") + ALIGN_BYTES for tensor in wanted))
    with Quantiser(
        checkpoint.directory, writer.staging, plan.formats, dtype=plan.dtype, may_use_gpu=may_use_gpu
    ) as quantiser:
        tensors, weights = _copied(writer, plain, checkpoint, tell)
        done = quantiser.finish(partial(tell, "quantise"))
    entries = {tensor.name: tensor for tensor in tensors}
    entries |= {tensor.name: _shifted(tensor, len(weights)) for tensor in done.tensors}
    return tuple(entries[tensor.name] for tensor in wanted), (*weights, *done.weights), done


def _shifted(tensor: TensorEntry, n_files: int) -> TensorEntry:
    """Count the files of a tensor's pieces after the first `n_files`."""
    pieces = tuple(msgspec.structs.replace(piece, file=piece.file + n_files) for piece in tensor.pieces)
    return msgspec.structs.replace(tensor, pieces=pieces)


def _remember(artifact: Artifact, done: Done) -> None:
    """Store how far the quantised weights are from the checkpoint's."""
    append_evidence(artifact, WEIGHT_ERROR, done.error, device=done.device)


def _copied(
    writer: EngineWriter, specs: Sequence[TensorSpec], checkpoint: Checkpoint, tell: Progress
) -> tuple[tuple[TensorEntry, ...], tuple[WeightFile, ...]]:
    """Copy tensors into the engine's own files, each on a page of its own."""
    sizes = [sum(checkpoint.tensors[source].n_bytes for source in spec.sources) for spec in specs]
    writer.require_space(sum(size + ALIGN_BYTES for size in sizes))
    count = _counter(tell, "copy", sum(sizes))
    tensors: list[TensorEntry] = []
    files: list[WeightFile] = []
    for group in _groups(specs, sizes):
        with writer.weights(f"weights-{len(files) + 1:05d}.bin") as weights:
            for spec in group:
                weights.align()
                pieces = []
                for source in spec.sources:
                    data = checkpoint.bytes(source)
                    offset = weights.append(data, count)
                    dtype = checkpoint.tensors[source].dtype
                    pieces.append(Piece(file=len(files), offset=offset, n_bytes=len(data), dtype=dtype))
                tensors.append(
                    TensorEntry(name=spec.name, shape=spec.shape, dtype=None, pieces=_joined(pieces))
                )
            files.append(weights.entry())
    return tuple(tensors), tuple(files)


def _groups(specs: Sequence[TensorSpec], sizes: Sequence[int]) -> Iterator[list[TensorSpec]]:
    """Split the tensors, in order, into files of bounded size."""
    group: list[TensorSpec] = []
    n_bytes = 0
    for spec, size in zip(specs, sizes, strict=True):
        if group and n_bytes + size > _MAX_WEIGHT_FILE_BYTES:
            yield group
            group, n_bytes = [], 0
        group.append(spec)
        n_bytes += size
    yield group


def _joined(pieces: list[Piece]) -> tuple[Piece, ...]:
    """Make one piece of neighbours of the same dtype."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and last.dtype == piece.dtype and last.offset + last.n_bytes == piece.offset:
            joined[-1] = Piece(
                file=last.file, offset=last.offset, n_bytes=last.n_bytes + piece.n_bytes, dtype=last.dtype
            )
        else:
            joined.append(piece)
    return tuple(joined)


def _copy_files(writer: EngineWriter, directory: Path) -> tuple[FileEntry, ...]:
    present = [name for name in COPIED_FILES if (directory / name).exists()]
    return tuple(writer.add_file(name, read_bytes(directory / name, _MAX_COPIED_BYTES)) for name in present)


def _path_from(out: Path, path: Path) -> str:
    """Return a relative path where checkpoint and engine lie side by side and so may move together."""
    side_by_side = out.parent in path.parents
    return os.path.relpath(path, out) if side_by_side else str(path)


def _counter(tell: Progress, stage: str, total_bytes: int) -> Callable[[int], None]:
    """Return a function that adds to the bytes done and tells them; it may be called from any thread."""
    lock, done_bytes = threading.Lock(), 0

    def count(n_bytes: int) -> None:
        nonlocal done_bytes
        with lock:
            done_bytes += n_bytes
            tell(stage, done_bytes, total_bytes)

    return count


def _silent(stage: str, done_bytes: int, total_bytes: int) -> None:
    return None
