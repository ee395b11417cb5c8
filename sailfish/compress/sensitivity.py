"""Measures what each matrix costs in each format, and gives bits where they buy the most.

A matrix is rounded alone, all others being the parent's, and the divergence of the outputs is measured over
some windows. Divergences of small errors add up nearly, so that a sum of them is what a choice will cost.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from sailfish.base.errors import ConfigError
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.checkpoint.names import LAYER_WEIGHT, check_tensors, linear_modules, tensor_specs
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.compress.block import Device, Memory, read_tensor
from sailfish.compress.recipe import Override, Recipe, Round, stored_bits
from sailfish.compress.rtn import quantise_int, restore_int
from sailfish.models.arena import arena_layout
from sailfish.models.load import assemble, load_weights
from sailfish.plan.formats import arena_tensors
from sailfish.plan.types import WeightFormats
from sailfish.quality.metrics import compare_tokens
from sailfish.quality.model import WindowModel
from sailfish.quality.windows import Window

N_WINDOWS = 4
"""Windows that are enough to tell matrices apart."""
CANDIDATES = (
    Round(to="int3"),
    Round(to="int4"),
    Round(to="int4", group=32),
    Round(to="int8", group=None),
)
"""What a matrix may be rounded to, by bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A matrix in one format."""

    matrix: str
    """The engine's name: "layers.3.gate_up.weight"."""
    modules: tuple[str, ...]
    """The checkpoint's linears that it is made of."""
    n_weights: int
    n_in: int
    rounding: Round
    kl: float
    """Mean divergence from the parent, in nats, when nothing else is rounded."""

    @property
    def bits(self) -> float:
        """Bits that all of it takes."""
        return stored_bits(self.rounding, self.n_in) * self.n_weights


def measure(
    source: Path,
    windows: Sequence[Window],
    candidates: Sequence[Round],
    on: Device,
    tell: Callable[[str, int, int], None],
) -> list[Cost]:
    """Return the cost of each matrix of the blocks in each format; the whole model is in memory.

    Experts are left out. Raises ConfigError for a model without other matrices.
    """
    config, checkpoint = load_model_config(source), Checkpoint.open(source)
    check_tensors(config, checkpoint)
    arena = arena_tensors(config, WeightFormats())
    _, n_bytes = arena_layout(arena, on.dtype)
    room = torch.empty(n_bytes, dtype=torch.uint8, device=on.torch)
    specs = tensor_specs(config)
    pieces = {spec.name: [Memory(read_tensor(checkpoint, s)) for s in spec.sources] for spec in specs}
    weights = assemble(config, WeightFormats(), load_weights(arena, pieces, room, on.dtype))
    del pieces
    window_tokens = max(len(window.tokens) for window in windows)
    model = WindowModel.of_weights(
        config, weights, target=on.target, dtype=on.dtype, window_tokens=window_tokens
    )
    parent = [model.hidden(window.tokens) for window in windows]
    matrices = [spec for spec in specs if LAYER_WEIGHT.fullmatch(spec.name)]
    if not matrices:
        raise ConfigError("the model's blocks have no matrices but experts'", param="budget")
    costs = []
    for done, spec in enumerate(matrices):
        tell("measuring sensitivity", done, len(matrices))
        weight_OI = weights[spec.name]
        assert isinstance(weight_OI, Tensor), "all weights are plain"
        original_OI = weight_OI.clone()
        for rounding in candidates:
            codes = quantise_int(original_OI, rounding.group, rounding.symmetric, bits=rounding.bits)
            weight_OI.copy_(restore_int(*codes, rounding.group, bits=rounding.bits))
            costs.append(
                Cost(
                    matrix=spec.name,
                    modules=tuple(linear_modules(spec)),
                    n_weights=original_OI.numel(),
                    n_in=original_OI.shape[1],
                    rounding=rounding,
                    kl=_divergence(model, parent, windows),
                )
            )
        weight_OI.copy_(original_OI)
    return costs


def choose(
    costs: Sequence[Cost], *, budget_bits: float | None = None, max_kl: float | None = None
) -> list[Cost]:
    """Return one cost for each matrix: the least divergence within a mean of `budget_bits` a weight.

    Without a budget, the fewest bits whose divergences sum up to at most `max_kl`. From the smallest format
    up, the step that lowers the divergence most for its bits goes first (the greedy solution of the
    multiple-choice knapsack, Sinha and Zoltners 1979). ConfigError where even the extremes do not reach.
    """
    ladders: dict[str, list[Cost]] = {}
    for cost in costs:
        ladders.setdefault(cost.matrix, []).append(cost)
    ladders = {matrix: _hull(its) for matrix, its in ladders.items()}
    at = dict.fromkeys(ladders, 0)
    n_weights = sum(its[0].n_weights for its in ladders.values())
    bits = sum(its[0].bits for its in ladders.values())
    kl = sum(its[0].kl for its in ladders.values())
    room = None if budget_bits is None else budget_bits * n_weights
    if room is not None and bits > room:
        raise ConfigError(
            f"{budget_bits:g} bits a weight are less than the smallest format's {bits / n_weights:g}",
            param="budget",
        )
    steps = [(_worth(its, 0), matrix) for matrix, its in ladders.items() if len(its) > 1]
    heapq.heapify(steps)
    while steps and (max_kl is None or kl > max_kl):
        _, matrix = heapq.heappop(steps)
        its, place = ladders[matrix], at[matrix]
        more = its[place + 1].bits - its[place].bits
        if room is not None and bits + more > room:
            continue
        at[matrix] += 1
        bits, kl = bits + more, kl + its[place + 1].kl - its[place].kl
        if place + 2 < len(its):
            heapq.heappush(steps, (_worth(its, place + 1), matrix))
    if max_kl is not None and kl > max_kl:
        raise ConfigError(f"a divergence of {max_kl:g} is out of reach: {kl:.4f} is expected", param="max_kl")
    return [ladders[matrix][place] for matrix, place in at.items()]


def mixed(recipe: Recipe, chosen: Sequence[Cost]) -> Recipe:
    """Return a recipe that rounds each matrix as chosen, by the recipe's own method.

    ConfigError where the recipe's layout cannot hold several formats, or where it mixes some already.
    """
    if recipe.round is None or recipe.layout != "pack-quantized" or recipe.activations != "none":
        raise ConfigError(
            f"{recipe.name} has one format for all weights",
            hint="a budget takes a recipe that rounds weights into pack-quantized",
            param="budget",
        )
    if recipe.overrides:
        raise ConfigError(
            f"{recipe.name} says itself how some linears are rounded",
            hint="leave its overrides or the budget out",
            param="budget",
        )
    if recipe.cut is not None:
        raise ConfigError(
            f"{recipe.name} cuts parts of the model, and a budget is one of the whole",
            hint="cut first by a recipe of its own, then compress what is left",
            param="budget",
        )
    overrides = [
        Override(
            match=module,
            round=msgspec.structs.replace(recipe.round, to=cost.rounding.to, group=cost.rounding.group),
        )
        for cost in chosen
        for module in cost.modules
    ]
    return msgspec.structs.replace(recipe, overrides=overrides)


def _hull(costs: Sequence[Cost]) -> list[Cost]:
    """Return the formats of a matrix that are worth their bits, from the smallest to the best."""
    kept: list[Cost] = []
    for cost in sorted(costs, key=lambda cost: (cost.bits, cost.kl)):
        if kept and cost.kl >= kept[-1].kl:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) >= _slope(kept[-2], cost):
            kept.pop()
        kept.append(cost)
    return kept


def _slope(less: Cost, more: Cost) -> float:
    return (more.kl - less.kl) / (more.bits - less.bits)


def _worth(ladder: Sequence[Cost], place: int) -> float:
    return _slope(ladder[place], ladder[place + 1])


def _divergence(model: WindowModel, parent: Sequence[Tensor], windows: Sequence[Window]) -> float:
    total, n_tokens = 0.0, 0
    for parent_TD, window in zip(parent, windows, strict=True):
        ours_TD = model.hidden(window.tokens)
        scored = slice(window.n_context - 1, -1)
        target_S = torch.tensor(window.tokens[window.n_context :]).to(model.device)
        kl_S = compare_tokens(model.logits(ours_TD[scored]), model.logits(parent_TD[scored]), target_S).kl_S
        total += float(kl_S.sum())
        n_tokens += len(kl_S)
    return total / n_tokens
