"""What each recipe costs a model in quality, as rows beside what files of other tools cost it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import exp, expm1
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from sailfish.base.errors import ConfigError
from sailfish.bench.results import Recorder, Result
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.compress import recipe as recipes
from sailfish.compress.block import Device
from sailfish.compress.driver import Tell
from sailfish.compress.make import Request, make
from sailfish.compress.parent import ParentStates
from sailfish.compress.recipe import Bound, Calibration, Recipe
from sailfish.compress.texts import read_texts
from sailfish.hardware.profile import HardwareProfile
from sailfish.plan.types import CacheDtype, Dtype
from sailfish.quality.evaluate import compare
from sailfish.quality.intervals import Interval, normal_interval
from sailfish.quality.model import WindowModel
from sailfish.quality.scores import Comparison
from sailfish.quality.windows import Window

Metric = Literal["perplexity", "increase", "kl", "top1"]
UNITS: dict[Metric, str] = {"perplexity": "", "increase": "%", "kl": "nats", "top1": "%"}
"""increase: of the perplexity over the parent's; top1: tokens before which both find one the likeliest."""
_DTYPE: Dtype = "float32"
"""Of activations: differences as small as these drown in bfloat16's."""
_BY_PEERS: tuple[Metric, ...] = ("perplexity", "kl", "top1")


class Case(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that is measured, and what is wanted of it."""

    name: str
    recipe: str | None = None
    """Packaged, or a file of that name beside the table; null: the parent, whose cache is in `kv`."""
    kv: CacheDtype | None = None
    samples: int | None = None
    """Calibration windows; null: the recipe's."""
    peers: dict[str, dict[Metric, float]] = {}
    """Figures of others by whose they are."""
    bars: dict[Metric, float] = {}
    """Wanted outright. Without any, no figure shall be worse than the best peer's beyond its interval."""

    def __post_init__(self) -> None:
        if (self.recipe is None) is (self.kv is None):
            raise ValueError(f"{self.name} needs either a recipe or kv")

    def best(self, metric: Metric) -> tuple[str, float] | None:
        """Return the best peer's name and figure, None without one."""
        known = [(name, figures[metric]) for name, figures in self.peers.items() if metric in figures]
        pick = max if metric == "top1" else min
        return pick(known, key=lambda peer: peer[1], default=None)

    def is_met_by(self, metric: Metric, value: float, spread: float) -> bool | None:
        """Say whether a figure, whose interval is `spread` wide, is as wanted; None if nothing is."""
        sign = -1 if metric == "top1" else 1
        if self.bars:
            return sign * value <= sign * self.bars[metric] if metric in self.bars else None
        best = self.best(metric) if metric in _BY_PEERS else None
        return None if best is None else sign * value - spread / 2 <= sign * best[1]


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is measured of one model."""

    model: str
    about: str
    """Where the peers' figures are from."""
    cases: list[Case]

    @classmethod
    def read(cls, path: Path) -> Table:
        """Read a table of JSON; raises ConfigError."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}", param="cases") from None
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path} is not a table of cases: {error}", param="cases") from None


def row_name(model: str, case: Case, metric: Metric) -> str:
    """Return what the row of a figure is called."""
    return f"{model} {case.name}: {metric}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """A model and the texts that every case is measured with."""

    source: Path
    calibration: Path
    evaluation: Path
    n_windows: int
    n_near: int
    """The first windows, over which `kl` and `top1` are taken."""
    window_tokens: int
    hardware: HardwareProfile
    recipes: Path
    """A folder with recipes that are not packaged."""
    parent: ParentStates = field(default_factory=ParentStates)

    def comparison(self, case: Case, tell: Tell) -> Comparison:
        """Make what the case asks for, write nothing, and return it beside its parent.

        A recipe's bound does not count: what costs much is told as well. Raises as `make` does.
        """
        if case.recipe is None:
            assert case.kv is not None, "a case has one of both"
            return self._of_cache(case.kv)
        recipe = self._recipe(case.recipe)
        samples = recipe.calibration.samples if case.samples is None else case.samples
        wanted = msgspec.structs.replace(recipe.calibration, samples=samples, tokens=self.window_tokens)
        request = Request(
            source=self.source,
            recipe=msgspec.structs.replace(recipe, calibration=wanted, bound=Bound()),
            calibration=self.calibration,
            evaluation=self.evaluation,
            n_evaluation=self.n_windows,
            on=Device(target=self.hardware.target, dtype=_DTYPE),
            device_name=self.hardware.name,
            free_bytes=self.hardware.free_bytes,
            parent=self.parent,
        )
        windows = make(request, None, tell).quality.windows
        return Comparison.of_windows(
            [np.array([figure]) for figure in msgspec.structs.astuple(window)] for window in windows
        )

    def results(self, case: Case, comparison: Comparison, recorder: Recorder) -> Iterator[Result]:
        """Yield a row of each figure: its spread is the width of the interval that `figures` gives."""
        for metric, found in figures(comparison, self.n_near).items():
            peer, peer_value = case.best(metric) or (None, None)
            yield recorder.result(
                row_name(self.source.resolve().name, case, metric),
                (found.low, found.value, found.high),
                UNITS[metric],
                target=case.bars.get(metric),
                peer=peer,
                peer_value=peer_value,
            )

    def _recipe(self, name: str) -> Recipe:
        own = self.recipes / f"{name}.yaml"
        return recipes.load(str(own) if own.exists() else name)

    def _of_cache(self, kv: CacheDtype) -> Comparison:
        def model(kv_dtype: CacheDtype) -> WindowModel:
            return WindowModel.of_checkpoint(
                self.source,
                target=self.hardware.target,
                dtype=_DTYPE,
                kv_dtype=kv_dtype,
                window_tokens=self.window_tokens,
            )

        return compare(model(kv), model(_DTYPE), self._windows())

    def _windows(self) -> Sequence[Window]:
        config = load_model_config(self.source)
        texts = read_texts(
            self.source,
            self.calibration,
            self.evaluation,
            Calibration(samples=1, tokens=self.window_tokens),
            self.n_windows,
            vocab_size=config.vocab_size,
            context_tokens=config.context_tokens,
        )
        return texts.evaluation


def figures(comparison: Comparison, n_near: int) -> dict[Metric, Interval]:
    """Return each metric with its 95% interval over windows, shares in percent.

    The perplexity's interval is of the choice of windows that the parent read too: that of the increase.
    """
    near = comparison.first(n_near)
    apart = [np.subtract(*pair) for pair in zip(comparison.model.nll, comparison.parent.nll, strict=True)]
    increase = normal_interval(apart).map(expm1)
    parent = exp(normal_interval(comparison.parent.nll).value)
    return {
        "perplexity": increase.map(lambda share: parent * (1 + share)),
        "increase": increase.map(lambda share: 100 * share),
        "kl": normal_interval(near.kl),
        "top1": normal_interval(near.is_same_top).map(lambda share: 100 * share),
    }
