"""What a build asks of the process that quantises its weights, and what that says in answer. No torch."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from sailfish.artifact.manifest import TensorEntry, WeightFile
from sailfish.checkpoint.model_config import StoredWeights
from sailfish.plan.types import Dtype, WeightFormats


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """Quantise the weights that `formats` asks for, into files of the directory `out`.

    Those that the checkpoint stores quantised are kept so, or restored where `formats` has them plain.
    """

    checkpoint: str
    out: str
    formats: WeightFormats
    dtype: Dtype
    """Of restored weights."""
    may_use_gpu: bool


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Bytes of the checkpoint that are quantised so far."""

    done_bytes: int
    total_bytes: int


class Done(msgspec.Struct, frozen=True, tag="done"):
    """All is written and durable."""

    tensors: list[TensorEntry]
    """Their pieces count the files from 0."""
    weights: list[WeightFile]
    error: dict[str, float]
    """Mean of ||W - Wq|| / ||W|| over the weights of each kind, such as "gate_up", that were rounded."""
    device: str
    """"cpu" or "cuda": where it was done."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """It cannot be done, and why."""

    code: str
    message: str
    hint: str | None = None


def method(formats: WeightFormats, stored: StoredWeights | None = None) -> str:
    """Return in words how weights are quantised."""
    if stored is not None and formats.stored:
        rest = {formats.head, formats.embedding} - {"plain"}
        if not rest:
            return f"the checkpoint: {stored.words}"
        return f"the checkpoint: {stored.words}; {method(replace(formats, layers='plain', stored=False))}"
    kinds = {formats.layers, formats.head, formats.embedding}
    parts = [f"int4 with scales of least squared error for {formats.group} inputs"] if "int4" in kinds else []
    parts += [f"{kind} with a scale for each row" for kind in ("int8", "fp8") if kind in kinds]
    return f"round to nearest: symmetric {', '.join(parts)}"
