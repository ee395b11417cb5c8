"""Keeps where a training run is, as safetensors and JSON, so that it goes on as if it had never stopped."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from sailfish.base.errors import ConfigError
from sailfish.checkpoint.files import read_bytes
from sailfish.checkpoint.formats.tensors import StoredTensor
from sailfish.checkpoint.formats.writer import CheckpointWriter
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.compress.block import read_tensor
from sailfish.compress.distill.ranks import Ranks, fill, whole
from sailfish.compress.distill.train import Point, Schedule, Trainer

_FILE = "state.json"
_MAX_BYTES = 256 << 20
_PARTS = ("weight", "exp_avg", "exp_avg_sq")


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What a run has done, and of what."""

    schedule: Schedule
    inputs: str
    """Digest of both models and of the windows."""
    steps_done: int
    curve: list[Point]


def save(directory: Path, trainer: Trainer, progress: Progress, ranks: Ranks) -> None:
    """Write the run's state into `directory` and remove the one before it; every process calls this."""
    place = directory / f"step-{progress.steps_done}"
    tensors = ((f"{part}.{name}", tensor) for name, found in _parts(trainer) for part, tensor in found)
    if ranks.rank != 0:
        for _, tensor in tensors:
            whole(tensor)
        return
    with CheckpointWriter(place) as writer:
        for name, tensor in tensors:
            writer.add(name, StoredTensor(dtype="F32", array=whole(tensor).numpy()))
        writer.finish({_FILE: msgspec.json.encode(progress)})
    for other in directory.glob("*step-*"):
        if other != place:
            shutil.rmtree(other)


def load(directory: Path, trainer: Trainer, schedule: Schedule, inputs: str) -> list[Point]:
    """Fill the trainer from the newest state, if one was saved, and return the curve so far.

    Raises ConfigError where it is of another run, or damaged.
    """
    places = sorted(directory.glob("step-*"), key=lambda place: int(place.name.removeprefix("step-")))
    if not places:
        return []
    try:
        progress = msgspec.json.decode(read_bytes(places[-1] / _FILE, _MAX_BYTES), type=Progress)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{places[-1] / _FILE} is not a run's state: {error}", hint=f"remove {directory} and begin anew"
        ) from None
    if progress.schedule != schedule:
        old, new = msgspec.to_builtins(progress.schedule), msgspec.to_builtins(schedule)
        apart = ", ".join(f"{key} {old[key]} then, {new[key]} now" for key in old if old[key] != new[key])
        raise ConfigError(f"{directory} is of a run that differs: {apart}", hint="give the flags of that run")
    if progress.inputs != inputs:
        raise ConfigError(
            f"{directory} is of another teacher, student or text", hint="give what that run was given"
        )
    checkpoint = Checkpoint.open(places[-1])
    for parameter in trainer.weights.values():
        trainer.optimiser.state[parameter] = {
            "step": torch.tensor(float(progress.steps_done)),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    for name, found in _parts(trainer):
        for part, tensor in found:
            fill(tensor, read_tensor(checkpoint, f"{part}.{name}"))
    return progress.curve


def _parts(trainer: Trainer) -> Sequence[tuple[str, list[tuple[str, torch.Tensor]]]]:
    """Return each weight's name with the tensors that make its state."""
    state = trainer.optimiser.state
    return [
        (name, [("weight", p.detach()), *((part, state[p][part]) for part in _PARTS[1:])])
        for name, p in trainer.weights.items()
    ]
