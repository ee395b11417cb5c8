"""Measures what each matrix costs in each format, and gives bits where they buy the most.

A matrix is rounded alone by the recipe's own method, all others being the parent's, and the divergence of the
outputs is measured over some windows that the method has not seen. Divergences of small errors add up nearly,
so that a sum of them is what a choice will cost.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import torch
from torch import Tensor

from sailfish.base.errors import ConfigError
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.checkpoint.names import check_tensors
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.compress.block import Block, Device, block_tensors, embedded, outer_tensors, sites
from sailfish.compress.inputs import Inputs
from sailfish.compress.recipe import Override, Recipe, Round, stored_bits
from sailfish.compress.step import compress_block
from sailfish.quality.metrics import compare_tokens
from sailfish.quality.windows import Window

N_WINDOWS = 4
"""Windows that are enough to tell matrices apart."""
Format = tuple[Literal["int3", "int4", "int8"], int | None]
"""Numbers, and inputs that share a scale; None: all of a row."""
FORMATS: tuple[Format, ...] = (
    ("int3", 128),
    ("int3", 32),
    ("int4", 128),
    ("int4", 64),
    ("int4", 32),
    ("int8", None),
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
    recipe: Recipe,
    windows: Sequence[Window],
    on: Device,
    tell: Callable[[str, int, int], None],
    *,
    formats: Sequence[Format] = FORMATS,
) -> list[Cost]:
    """Return the cost of each matrix of the blocks in each format; the whole model is in memory.

    The last windows are measured, the method learns from the others. Experts and what a recipe folds are
    left out. Raises ConfigError for a model without other matrices.
    """
    n_learned = max(1, len(windows) - N_WINDOWS)
    trials = _Trials(source, recipe, windows[:n_learned], windows[n_learned:] or windows, on)
    costs = []
    for layer in range(trials.config.n_layers):
        tell("measuring sensitivity", layer, trials.config.n_layers)
        costs += trials.costs(layer, formats)
    if not costs:
        raise ConfigError("the model's blocks have no matrices but experts'", param="budget")
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
    overrides = [Override(match=module, round=cost.rounding) for cost in chosen for module in cost.modules]
    return msgspec.structs.replace(recipe, overrides=overrides)


class _Trials:
    """The parent's blocks, each tried in other formats when the states of all windows have come to it."""

    def __init__(
        self,
        source: Path,
        recipe: Recipe,
        learned: Sequence[Window],
        measured: Sequence[Window],
        on: Device,
    ) -> None:
        self.config = config = load_model_config(source)
        self._checkpoint = checkpoint = Checkpoint.open(source)
        check_tensors(config, checkpoint)
        self._recipe = msgspec.structs.replace(recipe, fold=None)
        self._on = on
        self._window_tokens = max(len(window.tokens) for window in (*learned, *measured))
        table_VD, norm_D, head_VD = outer_tensors(checkpoint, config)
        self._head = norm_D, head_VD
        learned = learned if self._recipe.needs_inputs else []
        self._learned = [embedded(config, window.tokens, table_VD, on) for window in learned]
        self._measured = [embedded(config, window.tokens, table_VD, on) for window in measured]
        self._windows = measured
        self._blocks = [
            self._block(layer, block_tensors(checkpoint, config, layer)) for layer in range(config.n_layers)
        ]
        self._parent = [self._logits(hidden_TD, 0) for hidden_TD in self._measured]

    def costs(self, layer: int, formats: Sequence[Format]) -> list[Cost]:
        """Return the costs of a block's matrices; to be called for one layer after the other."""
        where = [site for site in sites(self.config, layer) if not site.name.startswith("experts.")]
        inputs = {site.name: Inputs(site.n_in, self._on.torch) for site in where}

        def see(name: str, x_TI: Tensor) -> None:
            if name in inputs:
                inputs[name].add(x_TI)

        block, tensors = self._blocks[layer], block_tensors(self._checkpoint, self.config, layer)
        self._learned = [block.run(hidden_TD, see) for hidden_TD in self._learned]
        found = []
        for to, group in formats:
            assert self._recipe.round is not None
            rounding = msgspec.structs.replace(self._recipe.round, to=to, group=group)
            recipe = msgspec.structs.replace(self._recipe, round=rounding)
            made = compress_block(self.config, where, tensors, {}, inputs, recipe, self._on.torch)
            for site in where:
                names = {f"{module}.weight" for module in site.modules}
                trial = self._block(layer, tensors | {name: made.tensors[name] for name in names})
                found.append(
                    Cost(
                        matrix=f"layers.{layer}.{site.name}.weight",
                        modules=site.modules,
                        n_weights=sum(tensors[name].numel() for name in names),
                        n_in=site.n_in,
                        rounding=rounding,
                        kl=self._divergence(trial, layer),
                    )
                )
        self._measured = [block.run(hidden_TD) for hidden_TD in self._measured]
        return found

    def _block(self, layer: int, tensors: Mapping[str, Tensor]) -> Block:
        head = self._head if layer == self.config.n_layers - 1 else None
        return Block(self.config, layer, tensors, self._on, self._window_tokens, head=head)

    def _logits(self, hidden_TD: Tensor, start: int, trial: Block | None = None) -> Tensor:
        """Return what a window's states before block `start` become, that block being the trial if any."""
        blocks = self._blocks[start:] if trial is None else [trial, *self._blocks[start + 1 :]]
        for block in blocks:
            hidden_TD = block.run(hidden_TD)
        return blocks[-1].logits(hidden_TD[:-1])

    def _divergence(self, trial: Block, layer: int) -> float:
        """Return the mean divergence from the parent over all tokens that the measured windows score."""
        total, n_tokens = 0.0, 0
        for hidden_TD, parent_SV, window in zip(self._measured, self._parent, self._windows, strict=True):
            logits_SV = self._logits(hidden_TD, layer, trial)
            scored = slice(window.n_context - 1, None)
            target_S = torch.tensor(window.tokens[window.n_context :]).to(logits_SV.device)
            kl_S = compare_tokens(logits_SV[scored], parent_SV[scored], target_S).kl_S
            total += float(kl_S.sum())
            n_tokens += len(kl_S)
        return total / n_tokens


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
