"""What a distillation did and what it gained: the report that every student carries."""

from __future__ import annotations

import msgspec

from sailfish.compress.distill.train import Point, Schedule
from sailfish.compress.report import Estimate

REPORT_FILE = "distillation.json"
PAGE_FILE = "distillation.html"


class Beside(msgspec.Struct, frozen=True, kw_only=True):
    """A student beside its teacher, over the held-out windows."""

    perplexity: Estimate
    kl: Estimate
    """Mean divergence from the teacher, in nats."""
    top1: Estimate
    """Share of tokens before which both find the same one likeliest."""
    acceptance: Estimate
    """Mean sum of min(p, q): the chance that a token drafted by the student is kept."""


class Gain(msgspec.Struct, frozen=True, kw_only=True):
    """The student after less the student before, paired over the windows."""

    perplexity: Estimate
    """Ratio - 1."""
    kl: Estimate
    top1: Estimate
    acceptance: Estimate


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    teacher: str
    student: str
    sailfish: str
    torch: str
    device: str
    n_processes: int
    dtype: str
    """Of activations; the student's weights were trained in float32."""
    schedule: Schedule
    text: str
    """What was trained on."""
    n_windows: int
    n_sampled: int
    """Windows of them that the teacher wrote."""
    held_out: str
    n_held_windows: int
    teacher_perplexity: Estimate
    before: Beside
    after: Beside
    gain: Gain
    n_held_zeros: int
    """Matrices that kept their zeros."""
    curve: list[Point]
    seconds: float
    """Of training, in the process that ended it."""
    warnings: list[str]
