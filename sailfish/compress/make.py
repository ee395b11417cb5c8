"""`sailfish compress` in one call: reads, compresses, measures, refuses what does not pay, and reports."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import torch

from sailfish.artifact.reader import header_digest
from sailfish.base.errors import BuildError, ConfigError
from sailfish.checkpoint.formats.patterns import matches
from sailfish.checkpoint.formats.writer import CheckpointWriter
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.compress import recipe as recipes
from sailfish.compress.block import Device
from sailfish.compress.cut import n_layers_left, narrowed
from sailfish.compress.driver import Run, Tell, compress, refuse_fallbacks
from sailfish.compress.page import page
from sailfish.compress.parent import ParentStates
from sailfish.compress.recipe import Bound, Recipe
from sailfish.compress.report import (
    PAGE_FILE,
    REPORT_FILE,
    Estimate,
    LinearSpeed,
    Quality,
    Report,
    Sensitivity,
    WindowFigures,
    to_json,
    total_us,
)
from sailfish.compress.sensitivity import choose, measure, mixed
from sailfish.compress.speed import speeds
from sailfish.compress.texts import Texts, read_texts
from sailfish.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for."""

    source: Path
    recipe: Recipe
    calibration: Path | None
    """None: the packaged text."""
    evaluation: Path | None
    """None: windows that are held out of the calibration's file."""
    n_evaluation: int
    """Windows that quality is measured over."""
    on: Device
    device_name: str
    free_bytes: int
    """Memory that a model may take on the device."""
    strict: bool = False
    must_pay: bool = False
    sensitivity: tuple[Sensitivity, ...] = ()
    """What the recipe's overrides were chosen from."""
    parent: ParentStates = field(default_factory=ParentStates)
    """Shared by requests of one source and device, so that the parent reads the measured windows once."""


class Costly(BuildError):
    """A result that costs more than the recipe's bound; it was not written."""

    code = "costs_too_much"


def make(request: Request, out: Path | None, tell: Tell) -> Report:
    """Compress `request.source` into the new directory `out` (None: measure only) and return the report.

    Raises Costly where quality falls below the recipe's bound, with the nearest packaged recipe that was
    measured and keeps it; BuildError where a fallback or a format that does not pay is refused. Nothing is
    written then.
    """
    config = load_model_config(request.source)
    texts = _texts(request, config)
    if out is None:
        return _measured(request, config, texts, None, tell)
    with CheckpointWriter(out) as writer:
        try:
            return _measured(request, config, texts, writer, tell)
        except Costly as error:
            nearest = _nearest(request, tell)
            hint = "raise the bound in a recipe of your own" if nearest is None else nearest
            raise Costly(error.message, hint=hint) from None


def within(request: Request, budget_bits: float | None, max_kl: float | None, tell: Tell) -> Request:
    """Return the request with bits given to each matrix as it needs them, on some calibration windows.

    `max_kl` also becomes the recipe's bound. ConfigError where a budget cannot be kept or the recipe mixed.
    """
    config = load_model_config(request.source)
    mixed(request.recipe, [])  # refuses before anything is read or measured
    windows = _texts(request, config).calibration
    costs = measure(request.source, request.recipe, windows, request.on, tell)
    chosen = choose(costs, budget_bits=budget_bits, max_kl=max_kl)
    recipe = mixed(request.recipe, chosen)
    if max_kl is not None:
        recipe = msgspec.structs.replace(recipe, bound=msgspec.structs.replace(recipe.bound, max_kl=max_kl))
    facts = tuple(
        Sensitivity(
            matrix=cost.matrix,
            format=f"{cost.rounding.to}, {cost.rounding.group or 'rows'}",
            bits=cost.bits / cost.n_weights,
            kl=cost.kl,
            is_chosen=cost in chosen,
        )
        for cost in costs
    )
    return replace(request, recipe=recipe, sensitivity=facts)


def exceeds(quality: Quality, bound: Bound) -> str | None:
    """Return in words which figure is beyond its bound, None if none is."""
    if bound.max_ppl_increase is not None and quality.increase.value > bound.max_ppl_increase:
        return f"perplexity rises by {quality.increase.value:.2%}, more than {bound.max_ppl_increase:.2%}"
    if bound.max_kl is not None and quality.kl.value > bound.max_kl:
        return f"the divergence from the parent is {quality.kl.value:.4f}, more than {bound.max_kl:g}"
    return None


def _texts(request: Request, config: ModelConfig) -> Texts:
    return read_texts(
        request.source,
        request.calibration,
        request.evaluation,
        request.recipe.calibration,
        request.n_evaluation,
        vocab_size=config.vocab_size,
        context_tokens=config.context_tokens,
    )


def _measured(
    request: Request, config: ModelConfig, texts: Texts, out: CheckpointWriter | None, tell: Tell
) -> Report:
    timed = speeds(_left(config, request.recipe), request.recipe, request.on)
    made: list[Report] = []

    def finish(run: Run) -> dict[str, bytes]:
        report = _report(request, texts, run, timed)
        made.append(report)
        if request.strict:
            refuse_fallbacks(run.fallbacks)
        reason = exceeds(report.quality, request.recipe.bound)
        if reason is not None:
            raise Costly(f"{request.recipe.name} costs too much: {reason}")
        if request.must_pay:
            _refuse_slow(report, request)
        return {REPORT_FILE: to_json(report), PAGE_FILE: page([report]).encode()}

    compress(request.source, out, request.recipe, texts, request.on, request.parent, tell, finish)
    return made[0]


def _left(config: ModelConfig, recipe: Recipe) -> ModelConfig:
    """Return a config of the shapes that a recipe leaves; which layers these are is found later."""
    if recipe.cut is None:
        return config
    narrow = narrowed(config, recipe.cut)
    return replace(narrow, layers=narrow.layers[: n_layers_left(config, recipe.cut)])


def _refuse_slow(report: Report, request: Request) -> None:
    """Refuse a format that is no faster than its parent where the parent fits the device."""
    if report.bytes_before > request.free_bytes:
        return
    if request.recipe.cut is not None and request.recipe.layout == "dense":
        return  # the same kernels do less
    if not report.speeds:
        raise BuildError(
            f"{request.recipe.name} does not pay: dense weights take what the parent's do, which fit"
        )
    times = total_us(report.speeds, 1)
    if times is None:
        raise BuildError(
            f"{request.recipe.name} does not pay: no kernel here reads its weights, and the parent fits",
            hint="leave --must-pay out, or compress on the device that will run it with --device",
        )
    if times[1] >= times[0]:
        raise BuildError(
            f"{request.recipe.name} does not pay: its linears take {times[1]:.0f} us for a token, "
            f"the parent's {times[0]:.0f} us, and the parent fits"
        )


def _nearest(request: Request, tell: Tell) -> str | None:
    """Measure the other packaged recipes, smallest first, and return the first that keeps the bound."""
    asked = request.recipe
    others = [recipes.load(name) for name in recipes.names() if name != asked.name]
    others = [
        other
        for other in others
        if (other.layout == "dense") is (asked.layout == "dense")
        and (other.cut is None) is (asked.cut is None)
        and other.bits_per_weight >= asked.bits_per_weight
    ]
    for other in sorted(others, key=lambda other: (other.bits_per_weight, other.name)):
        trial = msgspec.structs.replace(other, bound=asked.bound, calibration=asked.calibration)
        try:
            report = make(replace(request, recipe=trial, strict=False, must_pay=False), None, tell)
        except (BuildError, ConfigError):  # it costs as much, or cannot hold the model's shapes
            continue
        quality = report.quality
        return (
            f"{other.name} keeps it: perplexity {quality.increase.value:+.2%}, "
            f"divergence {quality.kl.value:.4f}, {report.linear_bits:.2f} bits a weight"
        )
    return None


def _report(request: Request, texts: Texts, run: Run, timed: list[LinearSpeed]) -> Report:
    n_weights = sum(facts.n_out * facts.n_in for facts in run.linears)
    summary = run.comparison.summary()
    return Report(
        recipe=msgspec.to_builtins(request.recipe),
        parent=request.source.resolve().name,
        parent_digest=_digest(request.source),
        sailfish=__version__,
        torch=str(torch.__version__),
        device=request.device_name,
        calibration=texts.calibration_words if request.recipe.is_calibrated else "none",
        calibration_digest=texts.digest if request.recipe.is_calibrated else "",
        calibration_windows=len(texts.calibration) if request.recipe.is_calibrated else 0,
        calibration_tokens=len(texts.calibration[0].tokens),
        seed=request.recipe.calibration.seed,
        bytes_before=run.bytes_before,
        bytes_after=run.bytes_after,
        linear_bits=8 * sum(facts.n_bytes for facts in run.linears) / max(1, n_weights),
        quality=Quality(
            text=texts.evaluation_words,
            n_windows=summary.n_windows,
            window_tokens=len(texts.evaluation[0].tokens),
            n_tokens=summary.n_tokens,
            dtype=request.on.dtype,
            perplexity=Estimate.of(summary.perplexity),
            parent_perplexity=Estimate.of(summary.parent_perplexity),
            increase=Estimate.of(summary.increase),
            kl=Estimate.of(summary.kl),
            kl_p99=Estimate.of(summary.kl_p99),
            kl_p999=Estimate.of(summary.kl_p999),
            top1=Estimate.of(summary.top1),
            windows=[WindowFigures(*means) for means in run.comparison.window_means()],
        ),
        block_drift=run.drift,
        linears=run.linears,
        removed=run.removed,
        block_influence=run.influence,
        speeds=timed,
        sensitivity=list(request.sensitivity),
        warnings=_warnings(request, texts, run, timed),
        fallbacks=run.fallbacks,
        seconds=dict(run.seconds),
        peak_bytes=run.peak_bytes,
    )


def _warnings(request: Request, texts: Texts, run: Run, timed: Sequence[LinearSpeed]) -> list[str]:
    found = [w for w in texts.warnings if request.recipe.is_calibrated or "calibrat" not in w]
    slow = sorted({speed.implementation for speed in timed if speed.packed_us is None})
    if slow:
        found.append(f"no speed is given: packed linears run as {', '.join(slow)} on {request.device_name}")
    modules = [facts.module for facts in run.linears]
    unused = [o.match for o in request.recipe.overrides if not any(matches(m, o.match) for m in modules)]
    if unused:
        found.append(f"overrides that name no linear: {', '.join(unused)}")
    if run.bytes_after >= run.bytes_before:
        found.append("the result is no smaller than its parent: zeros are stored like other weights")
    return found


def _digest(source: Path) -> str:
    state = hashlib.sha256((source / "config.json").read_bytes())
    for file in sorted(Checkpoint.open(source).file_bytes):
        state.update(header_digest(source / file)[1].encode())
    return state.hexdigest()
