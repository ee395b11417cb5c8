"""What an engine's weights are stored in, kind by kind."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from sailfish.artifact.reader import Artifact
from sailfish.artifact.side import WEIGHT_ERROR, read_evidence
from sailfish.plan.formats import engine_specs, kind_of, parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """All weights of one kind, such as the "gate_up" of every layer."""

    name: str
    format: str
    """"int4", "int8" or "fp8", or the plan's dtype."""
    n_tensors: int
    n_weights: int
    n_bytes: int
    """In memory, scales and padding included."""
    error: float | None
    """Mean of ||W - Wq|| / ||W|| as the build measured it; None: not quantised, or not measured."""

    @property
    def bits(self) -> float:
        """Bits of memory for each weight."""
        return 8 * self.n_bytes / self.n_weights


def kinds(artifact: Artifact) -> list[Kind]:
    """Return the kinds of weights in the order the forward pass meets them."""
    plan, model = artifact.manifest.plan, artifact.manifest.model
    errors = _errors(artifact)
    found: dict[tuple[str, str], Kind] = {}
    for spec, format in engine_specs(model, plan.formats):
        name = kind_of(spec.name)
        tensors = parts(spec, format, plan.formats)
        last = found.get((name, format))
        found[name, format] = Kind(
            name=name,
            format=plan.dtype if format == "plain" else format,
            n_tensors=1 + (last.n_tensors if last else 0),
            n_weights=prod(spec.shape) + (last.n_weights if last else 0),
            n_bytes=sum(part.n_bytes(plan.dtype) for part in tensors) + (last.n_bytes if last else 0),
            error=None if format == "plain" else errors.get(name),
        )
    return list(found.values())


def _errors(artifact: Artifact) -> dict[str, float]:
    """Return the latest measurements of each kind."""
    found: dict[str, float] = {}
    for evidence in read_evidence(artifact):
        if evidence.kind == WEIGHT_ERROR:
            found |= {name: value for name, value in evidence.values.items() if isinstance(value, float)}
    return found
