"""Trains a student on its teacher's logits: AdamW, a warm-up and a cosine, in one process or in several."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import msgspec
import torch
from torch import Tensor, nn

from sailfish.base.errors import BuildError, ConfigError
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.compress.block import Device
from sailfish.compress.distill.loss import Aim, Divergence, Teacher, losses
from sailfish.compress.distill.ranks import Ranks, mean_over_ranks, shard, whole
from sailfish.compress.distill.stack import Stack

_BETAS = (0.9, 0.95)
_CLIP_NORM = 1.0
_WEIGHT_DECAY = 0.01
"""Of matrices."""
_WARM_UP_FRAC = 0.05
_PRUNED_FRAC = 0.05
"""A matrix with so many zeros was pruned: weights that were trained are hardly ever 0."""


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """All that a run's weights depend on beside the models and the text."""

    steps: int
    batch: int
    """Windows of a step, over all processes."""
    length: int
    """Tokens of a window."""
    lr: float
    """The highest, after the warm-up."""
    divergence: Divergence
    alpha: float
    """Share of the divergence; the rest is cross-entropy."""
    temperature: float
    seed: int
    keep_zeros: bool
    """Pruned matrices keep their zeros."""

    def __post_init__(self) -> None:
        """Raise ConfigError for values that nothing can be trained with."""
        for name, value in (("lr", self.lr), ("temperature", self.temperature)):
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"a {name} of {value:g} is not above 0", hint="use more", param=name)
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"an alpha of {self.alpha:g} is no share", hint="use 0 to 1", param="alpha")

    def lr_at(self, step: int) -> float:
        """Return the rate of a step: up in a line, then down as a cosine does. Loshchilov and Hutter 2016."""
        warm_up = max(1.0, _WARM_UP_FRAC * self.steps)
        return self.lr * min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def windows_at(self, step: int, n_windows: int) -> list[int]:
        """Return which windows a step reads: all once in an order of the seed, then in another, and so on."""
        first = step * self.batch
        return [
            _order(n_windows, self.seed, place // n_windows)[place % n_windows]
            for place in range(first, first + self.batch)
        ]


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """Where training stood: means over a step's positions, before its update."""

    step: int
    loss: float
    divergence: float
    """From the teacher, at the schedule's temperature: KL in nats, or the total variation distance."""
    cross_entropy: float
    lr: float
    gradient_norm: float
    """Before it was clipped."""


class Learner(nn.Module):
    """The student and its aim: one module whose call makes the loss, as sharding wants it."""

    def __init__(self, stack: Stack, aim: Aim) -> None:
        super().__init__()
        self.stack = stack
        self._aim = aim

    def forward(self, token_BL: Tensor, teacher: Teacher) -> Tensor:
        """Return the means that `losses` makes; every token of a window but the last predicts one."""
        hidden_SD = self.stack(token_BL)[:, :-1].flatten(0, 1)
        return losses(self._aim, hidden_SD, self.stack.head(), teacher, token_BL[:, 1:].flatten())


class Trainer:
    """A student under training, and its optimiser."""

    def __init__(
        self,
        teacher: tuple[ModelConfig, Mapping[str, Tensor]],
        student: tuple[ModelConfig, Mapping[str, Tensor]],
        schedule: Schedule,
        on: Device,
        ranks: Ranks,
    ) -> None:
        """Take both models' tensors by the checkpoints' names, of any float dtype, on the host."""
        self._on = on
        self._ranks = ranks
        self._schedule = schedule
        dtype = torch.float32 if on.dtype == "float32" else torch.bfloat16
        config, tensors = teacher
        self._teacher = Stack(config, {name: t.to(on.torch, dtype) for name, t in tensors.items()})
        self._teacher.requires_grad_(False)
        config, tensors = student
        masters = {name: t.to(on.torch, torch.float32, copy=True) for name, t in tensors.items()}
        aim = Aim(divergence=schedule.divergence, alpha=schedule.alpha, temperature=schedule.temperature)
        stack = Stack(config, masters, recompute=on.torch == "cuda")
        self._learner = Learner(stack, aim)
        shard(ranks, self._teacher.blocks)
        shard(ranks, [*stack.blocks, self._learner])
        self.weights: dict[str, nn.Parameter] = stack.checkpoint_parameters()
        groups = [
            {"params": [p for p in self.weights.values() if p.ndim > 1], "weight_decay": _WEIGHT_DECAY},
            {"params": [p for p in self.weights.values() if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, betas=_BETAS)
        self._kept: list[tuple[nn.Parameter, Tensor]] = []
        if schedule.keep_zeros:
            self._kept = [(p, p.detach() != 0) for n, p in self.weights.items() if _is_pruned(tensors[n])]

    @property
    def n_held(self) -> int:
        """Matrices whose zeros are held."""
        return len(self._kept)

    def run(self, windows: Sequence[Sequence[int]], first: int, done: Callable[[Point], None]) -> None:
        """Do the steps from `first` on; `done` is told each. Raises BuildError where training diverges."""
        for step in range(first, self._schedule.steps):
            numbers = self._schedule.windows_at(step, len(windows))
            mine = numbers[self._ranks.rank :: self._ranks.n_ranks]
            done(self._step(step, torch.tensor([list(windows[n]) for n in mine]).to(self._on.torch)))

    def _step(self, step: int, token_BL: Tensor) -> Point:
        lr = self._schedule.lr_at(step)
        with self._autocast():
            with torch.no_grad():
                hidden_BLD = self._teacher(token_BL)
            teacher = Teacher(hidden_SD=hidden_BLD[:, :-1].flatten(0, 1), head=self._teacher.head())
            means = self._learner(token_BL, teacher)
        means[0].backward()
        for parameter, mask in self._kept:
            # A weight without gradients has no moments, and 0 decays to 0.
            assert parameter.grad is not None
            parameter.grad.mul_(mask)
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), _CLIP_NORM)
        loss, divergence, cross_entropy = mean_over_ranks(self._ranks, means.detach()).tolist()
        point = Point(
            step=step,
            loss=loss,
            divergence=divergence,
            cross_entropy=cross_entropy,
            lr=lr,
            gradient_norm=float(whole(norm)),
        )
        if not (math.isfinite(loss) and math.isfinite(point.gradient_norm)):
            raise BuildError(
                f"training diverged at step {step}: a loss of {loss}, gradients of {point.gradient_norm}",
                hint="use a lower --lr",
            )
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()
        self.optimiser.zero_grad()
        return point

    def _autocast(self) -> torch.autocast:
        # A cache of casts would outlive the whole weights of a sharded block.
        is_on = self._on.dtype == "bfloat16"
        return torch.autocast(self._on.torch, torch.bfloat16, enabled=is_on, cache_enabled=False)


def _is_pruned(weight: Tensor) -> bool:
    return weight.ndim > 1 and float((weight == 0).float().mean()) > _PRUNED_FRAC


@lru_cache(maxsize=2)
def _order(n_windows: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n_windows))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order
