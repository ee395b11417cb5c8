"""What a compression did and what it cost: the report that every compressed checkpoint carries. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sailfish.quality.intervals import Interval

REPORT_FILE = "compression.json"
PAGE_FILE = "compression.html"


class Fallback(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was done with less than was asked for; `--strict` makes it an error."""

    what: str
    where: str
    why: str


class LinearFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One linear: how it was compressed, and how far it is from its parent."""

    module: str
    n_out: int
    n_in: int
    how: str
    output_error: float | None
    """||X (W - Wq)|| / ||X W|| over what calibration saw of its inputs; None: it saw none."""
    weight_error: float
    """||W - Wq|| / ||W||."""
    zeros_frac: float
    alpha: float | None
    """Exponent of the factors folded into its inputs; None: none were."""
    n_bytes: int = 0
    """As it is stored, scales and zero points included."""
    dense_bytes: int = 0
    """As the parent stores weights, of as many."""


class Removed(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the model that is gone."""

    where: str
    """The layer, or the linear that read it, by the parent's name."""
    what: str
    influence: float
    """Of a layer, 1 less the mean cosine of its states before and after; else ||X (W - W')|| / ||X W||."""
    repaired: float | None
    """The latter once the linear is fitted to what its outputs were; None: it was not."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A figure and its 95% interval over windows."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, interval: Interval) -> Estimate:
        """Take a measured interval."""
        return cls(value=interval.value, low=interval.low, high=interval.high)


class WindowFigures(msgspec.Struct, frozen=True, array_like=True):
    """Means over the scored tokens of one window, as `metrics.TokenComparison` has them of a token."""

    nll: float
    parent_nll: float
    kl: float
    is_same_top: float
    acceptance: float


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """The compressed model beside its parent, over the same windows of text."""

    text: str
    """Where the windows are from."""
    n_windows: int
    window_tokens: int
    n_tokens: int
    """Scored ones."""
    dtype: str
    """Of activations."""
    perplexity: Estimate
    parent_perplexity: Estimate
    increase: Estimate
    """Perplexity over the parent's, less 1; paired."""
    kl: Estimate
    """Mean divergence from the parent, in nats."""
    kl_p99: Estimate
    kl_p999: Estimate
    top1: Estimate
    """Share of tokens before which both find the same one likeliest."""
    windows: list[WindowFigures] = []
    """In order, so that two reports over the same windows can be set against each other in pairs."""


class LinearSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """A shape of linear, packed, beside its dense parent on this device."""

    n_out: int
    n_in: int
    n_linears: int
    rows: int
    dense_us: float | None
    packed_us: float | None
    """None: no kernel of this device reads it, so a reference would be timed."""
    implementation: str


class Sensitivity(msgspec.Struct, frozen=True, kw_only=True):
    """A matrix in one format, all others being the parent's."""

    matrix: str
    format: str
    bits: float
    """A weight, scales included."""
    kl: float
    """Mean divergence from the parent, in nats."""
    is_chosen: bool


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    recipe: dict[str, object]
    """With every value written out."""
    parent: str
    parent_digest: str
    """SHA-256 over the names, types, shapes and sizes of the parent's tensors, and its config.json."""
    sailfish: str
    torch: str
    device: str
    calibration: str
    """Where the windows are from."""
    calibration_digest: str
    """SHA-256 over the windows' tokens; empty where nothing is learned from any."""
    calibration_windows: int
    calibration_tokens: int
    seed: int
    bytes_before: int
    bytes_after: int
    linear_bits: float
    """Bits that a weight of the blocks' linears takes, scales and zero points included."""
    quality: Quality
    block_drift: list[float]
    """||y - y of the parent|| / ||y of the parent|| after each block, over the first measured windows."""
    linears: list[LinearFacts]
    """By the parent's names."""
    removed: list[Removed] = []
    block_influence: list[float] = []
    """Of each of the parent's blocks, where some were to be removed for having little."""
    speeds: list[LinearSpeed]
    sensitivity: list[Sensitivity] = []
    """What a choice under a budget was made from."""
    warnings: list[str]
    fallbacks: list[Fallback]
    seconds: dict[str, float]
    """Wall time of each part."""
    peak_bytes: int
    """Of device memory on a GPU, else of the process."""


def total_us(found: Sequence[LinearSpeed], rows: int) -> tuple[float, float] | None:
    """Return what all linears take, (dense, packed), for so many tokens; None where one has no figure."""
    dense = packed = 0.0
    for speed in found:
        if speed.rows != rows:
            continue
        if speed.dense_us is None or speed.packed_us is None:
            return None
        dense += speed.dense_us * speed.n_linears
        packed += speed.packed_us * speed.n_linears
    return (dense, packed) if packed else None


def speed_words(report: Report) -> str:
    """Return how much faster the packed linears are for one token, as a table has it."""
    times = total_us(report.speeds, 1)
    if times is None:
        return "no kernel here" if report.speeds else ""
    return f"{times[0] / times[1]:.2f} x"


def to_json(report: Report) -> bytes:
    """Return the report as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2)


def from_json(data: bytes) -> Report:
    """Return the report of a JSON text."""
    return msgspec.json.decode(data, type=Report)
