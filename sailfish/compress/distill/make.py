"""`sailfish distill` in one call: checks, trains, measures before and after, writes and reports."""

from __future__ import annotations

import hashlib
import shutil
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import cast

import msgspec
import torch
from torch import Tensor

from sailfish.base.errors import ConfigError
from sailfish.checkpoint.files import read_bytes, read_json
from sailfish.checkpoint.formats.convert import MAX_SMALL_BYTES, SMALL_FILES
from sailfish.checkpoint.formats.tensors import FloatType, StoredTensor
from sailfish.checkpoint.formats.writer import CheckpointWriter
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.checkpoint.names import check_tensors, tensor_specs
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.compress.block import Device, read_tensor
from sailfish.compress.distill.page import page
from sailfish.compress.distill.ranks import Ranks, joined, whole
from sailfish.compress.distill.report import PAGE_FILE, REPORT_FILE, Beside, Gain, Report
from sailfish.compress.distill.sampled import Tell, Write, sample
from sailfish.compress.distill.stack import engine_weights
from sailfish.compress.distill.state import Progress, load, save
from sailfish.compress.distill.train import Point, Schedule, Trainer
from sailfish.compress.recipe import Calibration
from sailfish.compress.report import Estimate
from sailfish.compress.texts import Texts, read_texts
from sailfish.models.load import ARENA_DTYPES
from sailfish.quality.evaluate import compare_all
from sailfish.quality.model import WindowModel
from sailfish.quality.scores import Comparison, Summary, difference
from sailfish.version import __version__

_CONFIG, _TOKENIZER = "config.json", "tokenizer.json"
_CURVE_POINTS = 250
_MANY_EPOCHS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for."""

    teacher: Path
    student: Path
    schedule: Schedule
    text: Path | None
    """None: the packaged text."""
    evaluation: Path | None
    """None: windows that are held out of the text."""
    n_evaluation: int
    n_sampled: int
    """Windows that the teacher writes, trained on beside the text's."""
    write: Write
    on: Device
    device_name: str
    save_every: int
    resume: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    directory: Path
    checkpoint: Checkpoint
    config: ModelConfig

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by the checkpoint's names; a head that is tied has none of its own."""
        names = [source for spec in tensor_specs(self.config) for source in spec.sources]
        return {name: read_tensor(self.checkpoint, name) for name in names}


def distill(request: Request, out: Path, tell: Tell) -> Report | None:
    """Train the student and write it to the new directory `out`; None in processes other than the first.

    While it trains, its state is kept in a directory beside `out`. Raises ConfigError for models that do
    not belong together and for a state that is another run's, BuildError where training diverges.
    """
    teacher, student = _opened(request.teacher), _opened(request.student)
    _check_pair(request, teacher, student)
    writer = CheckpointWriter(out)
    state = out.with_name(f"{out.name}.state")
    if state.exists() and not request.resume:
        raise ConfigError(
            f"{state} is of a run that was stopped", hint="go on with --resume, or remove it", param="resume"
        )
    if request.resume and not state.exists():
        raise ConfigError(f"there is no {state} to go on from", hint="leave --resume out", param="resume")
    texts = _texts(request, teacher.config, student.config)
    with joined(request.on.torch) as ranks:
        trained = _train(request, teacher, student, texts, state, ranks, tell)
    if ranks.rank != 0:
        return None
    with writer:
        stored = {name: _rounded(student, name, weight) for name, weight in trained.weights.items()}
        before, after = _compared(request, texts, teacher, student, stored, tell)
        report = _report(request, texts, trained, before, after, ranks)
        for name, tensor in stored.items():
            writer.add(name, tensor)
        files = {REPORT_FILE: msgspec.json.format(msgspec.json.encode(report), indent=2)}
        writer.finish({**_small_files(student.directory), **files, PAGE_FILE: page(report).encode()})
    shutil.rmtree(state, ignore_errors=True)
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    weights: dict[str, Tensor]
    """Float32, on the host."""
    curve: list[Point]
    n_held_zeros: int
    n_windows: int
    seconds: float


def _opened(directory: Path) -> _Model:
    model = _Model(
        directory=directory, checkpoint=Checkpoint.open(directory), config=load_model_config(directory)
    )
    if model.config.stored is not None:
        raise ConfigError(
            f"{directory} is quantised: {model.config.stored.words}",
            hint="distill the dense checkpoint, then compress it",
        )
    check_tensors(model.config, model.checkpoint)
    return model


def _check_pair(request: Request, teacher: _Model, student: _Model) -> None:
    """Refuse models whose logits cannot be set side by side, and windows that one cannot read."""
    one, other = (_tokens(model.directory) for model in (teacher, student))
    if one != other or teacher.config.vocab_size != student.config.vocab_size:
        raise ConfigError(
            f"{student.directory} and {teacher.directory} have different tokenizers",
            hint="a student learns from a teacher of its own tokenizer",
            param="student",
        )
    room = min(teacher.config.context_tokens, student.config.context_tokens)
    if request.schedule.length > room:
        raise ConfigError(
            f"windows of {request.schedule.length} tokens are longer than a context of {room}",
            hint="use a shorter --length",
            param="length",
        )


def _tokens(directory: Path) -> dict[str, object]:
    """Return a tokenizer's file without what says how batches are cut and filled up."""
    values = read_json(directory / _TOKENIZER, MAX_SMALL_BYTES)
    return {key: value for key, value in values.items() if key not in ("padding", "truncation")}


def _texts(request: Request, *configs: ModelConfig) -> Texts:
    schedule = request.schedule
    return read_texts(
        request.teacher,
        request.text,
        request.evaluation,
        Calibration(samples=schedule.steps * schedule.batch, tokens=schedule.length, seed=schedule.seed),
        request.n_evaluation,
        vocab_size=min(config.vocab_size for config in configs),
        context_tokens=schedule.length,
    )


def _train(
    request: Request, teacher: _Model, student: _Model, texts: Texts, state: Path, ranks: Ranks, tell: Tell
) -> _Trained:
    schedule = request.schedule
    if schedule.batch % ranks.n_ranks:
        raise ConfigError(
            f"{schedule.batch} windows a step do not divide among {ranks.n_ranks} processes",
            hint="use a multiple",
            param="batch",
        )
    windows = [list(window.tokens) for window in texts.calibration]
    if request.n_sampled:
        windows += sample(request.write, windows, request.n_sampled, state, ranks, tell, seed=schedule.seed)
    inputs = _digest((teacher, student), windows)
    begun_s = time.perf_counter()
    trainer = Trainer(
        (teacher.config, teacher.tensors()), (student.config, student.tensors()), schedule, request.on, ranks
    )
    curve = load(state, trainer, schedule, inputs) if request.resume else []

    def done(point: Point) -> None:
        curve.append(point)
        if ranks.rank == 0:
            tell("training", len(curve), schedule.steps)
        if len(curve) % request.save_every == 0 and len(curve) < schedule.steps:
            progress = Progress(schedule=schedule, inputs=inputs, steps_done=len(curve), curve=curve)
            save(state, trainer, progress, ranks)

    trainer.run(windows, len(curve), done)
    return _Trained(
        weights={name: whole(weight) for name, weight in trainer.weights.items()},
        curve=curve,
        n_held_zeros=trainer.n_held,
        n_windows=len(windows),
        seconds=time.perf_counter() - begun_s,
    )


def _digest(models: Iterable[_Model], windows: Iterable[Sequence[int]]) -> str:
    state = hashlib.sha256()
    for model in models:
        for name in sorted(model.checkpoint.tensors):
            state.update(name.encode() + model.checkpoint.bytes(name))
    for window in windows:
        state.update(array("I", window).tobytes())
    return state.hexdigest()


def _rounded(student: _Model, name: str, weight: Tensor) -> StoredTensor:
    """Return a weight in the type that the student's checkpoint has it in."""
    dtype = cast("FloatType", student.checkpoint.tensors[name].dtype)
    return StoredTensor.rounded(weight.numpy(), dtype, name)


def _compared(
    request: Request,
    texts: Texts,
    teacher: _Model,
    student: _Model,
    stored: Mapping[str, StoredTensor],
    tell: Tell,
) -> tuple[Comparison, Comparison]:
    """Return the student before and after, each beside the teacher."""
    on, length = request.on, request.schedule.length
    before, parent = (
        WindowModel.of_checkpoint(model.directory, target=on.target, dtype=on.dtype, window_tokens=length)
        for model in (student, teacher)
    )
    tensors = {
        name: torch.from_numpy(tensor.floats()).to(on.torch, ARENA_DTYPES[on.dtype])
        for name, tensor in stored.items()
    }
    after = WindowModel.of_weights(
        student.config,
        engine_weights(student.config, tensors),
        target=on.target,
        dtype=on.dtype,
        window_tokens=length,
    )
    found = compare_all(
        [before, after], parent, texts.evaluation, lambda n, all_n: tell("measuring", n, all_n)
    )
    return found[0], found[1]


def _report(
    request: Request, texts: Texts, trained: _Trained, before: Comparison, after: Comparison, ranks: Ranks
) -> Report:
    summary, apart = before.summary(), difference(after, before)
    warnings = []
    if request.text is None:
        warnings.append("trained on the packaged text; --data takes one like what the models will read")
    n_epochs = request.schedule.steps * request.schedule.batch / trained.n_windows
    if n_epochs > _MANY_EPOCHS:
        warnings.append(f"every window was read {n_epochs:.0f} times: a longer text would teach more")
    return Report(
        teacher=request.teacher.resolve().name,
        student=request.student.resolve().name,
        sailfish=__version__,
        torch=str(torch.__version__),
        device=request.device_name,
        n_processes=ranks.n_ranks,
        dtype=request.on.dtype,
        schedule=request.schedule,
        text=texts.calibration_words,
        n_windows=trained.n_windows,
        n_sampled=request.n_sampled,
        held_out=texts.evaluation_words,
        n_held_windows=summary.n_windows,
        teacher_perplexity=Estimate.of(summary.parent_perplexity),
        before=_beside(summary),
        after=_beside(after.summary()),
        gain=Gain(
            perplexity=Estimate.of(apart.perplexity),
            kl=Estimate.of(apart.kl),
            top1=Estimate.of(apart.top1),
            acceptance=Estimate.of(apart.acceptance),
        ),
        n_held_zeros=trained.n_held_zeros,
        curve=_thinned(trained.curve),
        seconds=trained.seconds,
        warnings=warnings,
    )


def _beside(summary: Summary) -> Beside:
    return Beside(
        perplexity=Estimate.of(summary.perplexity),
        kl=Estimate.of(summary.kl),
        top1=Estimate.of(summary.top1),
        acceptance=Estimate.of(summary.acceptance),
    )


def _thinned(curve: Sequence[Point]) -> list[Point]:
    """Return means over as many steps as leave no more points than a plot shows."""
    every = -(-len(curve) // _CURVE_POINTS)
    groups = [curve[i : i + every] for i in range(0, len(curve), every)]
    return [
        Point(
            step=group[-1].step,
            **{
                field: fmean(getattr(point, field) for point in group)
                for field in Point.__struct_fields__
                if field != "step"
            },
        )
        for group in groups
    ]


def _small_files(source: Path) -> dict[str, bytes]:
    names = [name for name in (*SMALL_FILES, _CONFIG) if (source / name).is_file()]
    return {name: read_bytes(source / name, MAX_SMALL_BYTES) for name in names}
