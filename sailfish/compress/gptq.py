"""Rounds weights so that the error of each is made good by the ones after it, as the inputs seen weigh them.

GPTQ (Frantar et al. 2022, arXiv 2210.17323), with three additions of which each can be switched off: scales
that are searched where inputs weigh most and may be negative, scales refitted to the codes once these are
known, and sweeps that choose each code again with all others known. Works on CPU and CUDA tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.base.errors import BuildError, ConfigError

ActOrder = Literal["none", "static groups"]
"""Which input is rounded first: the first one; or the one that weighs most, which leaves groups in place."""

_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Ranges tried for a group, as shares of its largest absolute value."""
_UNSEEN = 0.01
"""What an input that was never other than 0 counts for, as a share of the mean one."""
_LEAST_DAMP, _MOST_DAMP = 1e-4, 1e3
"""Where damping that has to be raised begins, and where raising it has become hopeless."""
_CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Weights worked on at a time: they are walked column by column, so few long walks are better."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GptqFacts:
    """What a caller should tell of a weight that was quantised."""

    error: float
    """||X (W - Wq)|| / ||X W|| over the inputs X that the Hessian has seen; 0 where these outputs are 0."""
    asked_damp: float
    """The damping asked for, as a share of the Hessian's mean diagonal."""
    damp: float
    """The damping used: more than was asked for where the Hessian was singular."""
    n_dead: int
    """Inputs that were never other than 0: their weights are rounded to the nearest."""


class Hessian:
    """The mean of x x^T over all inputs x of a linear layer: half the Hessian of its mean squared error."""

    def __init__(
        self, n_in: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        self.mean_II = torch.zeros(n_in, n_in, dtype=dtype, device=device)
        self.n_tokens = 0

    def add(self, x_TI: Tensor) -> None:
        """Add inputs [..., I] of any float dtype, each of the leading axes' elements weighing the same."""
        x_TI = x_TI.reshape(-1, self.mean_II.shape[0])
        if not len(x_TI):
            return
        before, self.n_tokens = self.n_tokens, self.n_tokens + len(x_TI)
        if (
            x_TI.is_cuda
            and x_TI.dtype in (torch.bfloat16, torch.float16)
            and self.mean_II.dtype == torch.float32
        ):
            # Products of 16-bit numbers are exact in float32: tensor cores sum them, ten times as fast.
            product_II = torch.mm(x_TI.T, x_TI, out_dtype=torch.float32)
            self.mean_II.mul_(before / self.n_tokens).add_(product_II, alpha=1 / self.n_tokens)
            return
        x_TI = x_TI.to(self.mean_II)
        self.mean_II.addmm_(x_TI.T, x_TI, beta=before / self.n_tokens, alpha=1 / self.n_tokens)


def quantise_gptq(
    weight_OI: Tensor,
    hessian_II: Tensor,
    group: int | None,
    *,
    symmetric: bool = True,
    act_order: ActOrder = "static groups",
    damp: float = 0.01,
    block: int = 128,
    search: bool = True,
    refit: bool = True,
    sweeps: int = 0,
    bits: int = 4,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor | None, GptqFacts]:
    """Return (code_OI uint8 below 2^bits, scale_OG, zero_OG | None, facts): w is about (code - zero) * scale.

    `group`, the scales and the zeros are as in `rtn.quantise_int4`; codes stay in the order of the inputs
    whatever `act_order` is. The work is done in the dtype of hessian_II, as `Hessian` gathers it; `damp` of
    its mean diagonal is added to it, ten times more as often as it stays singular. `block` columns pass on
    their errors at once. With `search` a group takes the scale of least error among some, each weight's
    error weighed by the Hessian's diagonal; with `refit` all scales of a row are then fitted to its codes by
    least squares; each of `sweeps` repeats that after a round of coordinate descent over the codes (Behdin
    et al. 2023, arXiv 2309.01885). Neither ever raises a row's error. BuildError if a number is not finite.
    """
    _check(weight_OI, hessian_II, damp, bits, block)
    n_out, n_in = weight_OI.shape
    group = n_in if group is None else min(group, n_in)
    n_groups = -(-n_in // group)
    metric = _Metric.of(hessian_II, damp, act_order)
    grid = _Grid(group=group, symmetric=symmetric, top=2**bits - 1, search=search, dtype=dtype)
    code_OI = torch.empty_like(weight_OI, dtype=torch.uint8)
    scale_OG = weight_OI.new_empty((n_out, n_groups), dtype=dtype)
    zero_OG = None if symmetric else torch.empty_like(scale_OG)
    error = size = hessian_II.new_zeros((), dtype=torch.float64)
    for rows in _chunks(n_out, n_in, weight_OI.device):
        w_IO = weight_OI[rows].T.to(hessian_II.dtype).contiguous()
        fit = _round(w_IO, metric, grid, block, act_order)
        if refit:
            _refit(w_IO, fit, metric.damped_II, grid)
        for _ in range(sweeps):
            _sweep(w_IO, fit, metric.damped_II, grid, block)
            if refit:
                _refit(w_IO, fit, metric.damped_II, grid)
        error = error + _weigh(fit.restored(group) - w_IO, hessian_II).sum(dtype=torch.float64)
        size = size + _weigh(w_IO, hessian_II).sum(dtype=torch.float64)
        code_OI[rows] = fit.code_IO.T.to(torch.uint8)
        scale_OG[rows] = fit.scale_GO.T.to(dtype)
        if zero_OG is not None:
            zero_OG[rows] = fit.zero_GO.T.to(dtype)
    if not bool(scale_OG.isfinite().all()):
        raise BuildError("some weights are too large for the scale's dtype")
    facts = GptqFacts(
        error=float((error / size.clamp(min=1e-300)).clamp(min=0).sqrt()),
        asked_damp=damp,
        damp=metric.damp,
        n_dead=metric.n_dead,
    )
    return code_OI, scale_OG, zero_OG, facts


def _check(weight_OI: Tensor, hessian_II: Tensor, damp: float, bits: int, block: int) -> None:
    n_in = weight_OI.shape[1]
    if hessian_II.shape != (n_in, n_in):
        raise BuildError(f"a Hessian {tuple(hessian_II.shape)} is not that of {n_in} inputs")
    if hessian_II.dtype not in (torch.float32, torch.float64):
        raise BuildError(f"a Hessian is float32 or float64, not {hessian_II.dtype}")
    if not 2 <= bits <= 8 or damp < 0 or block < 1:
        raise ConfigError(
            f"bits {bits}, damp {damp} and block {block} are not supported",
            hint="use 2 to 8 bits, a damping of at least 0 and blocks of at least 1",
        )
    for what, tensor in (("weights", weight_OI), ("inputs' squares", hessian_II)):
        if not bool(tensor.isfinite().all()):
            raise BuildError(f"some {what} are not finite")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Metric:
    """How errors weigh: the damped Hessian, and what it does to the columns after each."""

    damped_II: Tensor
    order_I: Tensor | None
    """The inputs in the order in which they are rounded, None: as they lie."""
    factor_II: Tensor
    """Upper triangular U with U^T U the inverse of damped_II, both axes in that order."""
    damp: float
    n_dead: int

    @classmethod
    def of(cls, hessian_II: Tensor, damp: float, act_order: ActOrder) -> _Metric:
        """Damp the Hessian until it is positive definite, then factor it."""
        diagonal = hessian_II.diagonal()
        dead = diagonal <= 0
        n_dead = int(dead.sum())
        mean = float(diagonal.mean()) if n_dead < len(diagonal) else 1.0
        order = None if act_order == "none" else diagonal.argsort(descending=True, stable=True)
        used = damp
        while used <= _MOST_DAMP:
            damped = hessian_II.clone()
            damped.diagonal().add_(dead * (_UNSEEN * mean) + used * mean)
            factor = _factor(damped if order is None else damped[order][:, order], mean)
            if factor is not None:
                return cls(damped_II=damped, order_I=order, factor_II=factor, damp=used, n_dead=n_dead)
            used = max(10 * used, _LEAST_DAMP)
        raise BuildError("the inputs' Hessian is not one: no damping makes it positive definite")


def _factor(hessian_II: Tensor, mean: float) -> Tensor | None:
    """Return upper U with U^T U = H^-1, None where H is singular to working precision.

    Of H with both axes reversed the lower factor is, reversed again, an upper R with R R^T = H; U is R^-1.
    So one factorisation and one triangular solve do what the paper needs two and an inverse for.
    """
    lower, info = torch.linalg.cholesky_ex(hessian_II.flip(0, 1))
    least = torch.finfo(lower.dtype).eps * len(lower) ** 0.5 * mean
    if int(info) or not bool((lower.diagonal().square() > least).all()):
        return None
    unit = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), unit, upper=True)
    return factor


@dataclasses.dataclass(slots=True)
class _Fit:
    """Codes, scales and zeros of some rows, transposed, in the dtype of the work."""

    code_IO: Tensor
    scale_GO: Tensor
    zero_GO: Tensor

    def steps(self, group: int) -> Tensor:
        """Return code - zero [I, O]."""
        return self.code_IO - _spread(self.zero_GO, group, len(self.code_IO))

    def restored(self, group: int) -> Tensor:
        """Return the weights [I, O] that this stands for."""
        return self.steps(group).mul_(_spread(self.scale_GO, group, len(self.code_IO)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Grid:
    """The numbers that a group may be rounded to."""

    group: int
    symmetric: bool
    top: int
    """The largest code."""
    search: bool
    dtype: torch.dtype
    """That of stored scales."""

    def fit(self, w_GIO: Tensor, weigh_GI: Tensor) -> tuple[Tensor, Tensor]:
        """Return (scale, zero), both [G, O], of least weighed error among a few; of equal ones the first."""
        middle = (self.top + 1) // 2
        low, high = w_GIO.amin(1), w_GIO.amax(1)
        shares: tuple[float, ...]
        if self.symmetric:
            span = torch.where(-low >= high, low, high) / -middle
            shares = (middle / (middle - 1), *_SHARES)  # the first reaches as far on the other side
        else:
            low, high = low.clamp(max=0), high.clamp(min=0)
            span = (high - low) / self.top
            shares = _SHARES
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for share in shares if self.search else shares[:1]:
            scale = self.stored(span * share)
            zero = (-low * share / scale).round_().clamp_(0, self.top)
            zero = torch.full_like(scale, middle) if self.symmetric else zero
            if not self.search:
                return scale, zero
            codes = self.codes(w_GIO, scale[:, None], zero[:, None])
            wrong = codes.sub_(zero[:, None]).mul_(scale[:, None]).sub_(w_GIO).square_()
            error = torch.einsum("gio,gi->go", wrong, weigh_GI)
            if best is not None:
                is_less = error < best[0]
                scale, zero = torch.where(is_less, scale, best[1]), torch.where(is_less, zero, best[2])
                error = torch.minimum(error, best[0])
            best = error, scale, zero
        assert best is not None
        return best[1], best[2]

    def codes(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the nearest codes, in the dtype of the work."""
        return (w / scale).round_().add_(zero).clamp_(0, self.top)

    def stored(self, scale: Tensor) -> Tensor:
        """Round to what will be stored; 1 stands for 0."""
        rounded = scale.to(self.dtype).to(scale.dtype)
        return torch.where(rounded == 0, 1.0, rounded)


def _round(w_IO: Tensor, metric: _Metric, grid: _Grid, block: int, act_order: ActOrder) -> _Fit:
    """Round column after column, each one's error passed on to those after it."""
    n_in, n_out = w_IO.shape
    n_groups = -(-n_in // grid.group)
    weigh_I = metric.damped_II.diagonal()
    fit = _Fit(torch.empty_like(w_IO), w_IO.new_empty(n_groups, n_out), w_IO.new_empty(n_groups, n_out))
    is_static = act_order != "none"
    group_of = [i // grid.group for i in range(n_in)]
    if is_static:
        short = n_groups * grid.group - n_in
        padded = F.pad(w_IO, (0, 0, 0, short)).view(n_groups, grid.group, n_out)
        weigh_GI = F.pad(weigh_I, (0, short)).view(n_groups, grid.group)
        fit.scale_GO, fit.zero_GO = grid.fit(padded, weigh_GI)
    left = w_IO.clone() if metric.order_I is None else w_IO[metric.order_I]
    if metric.order_I is not None:
        group_of = [group_of[i] for i in metric.order_I.tolist()]
    code = fit.code_IO if metric.order_I is None else torch.empty_like(w_IO)
    factor = metric.factor_II
    for start, end in _blocks(n_in, grid.group, block, is_static):
        wrong = torch.empty_like(left[start:end])
        for i in range(start, end):
            g = group_of[i]
            if not is_static and i % grid.group == 0:
                its = slice(i, min(i + grid.group, n_in))
                scale, zero = grid.fit(left[None, its], weigh_I[None, its])
                fit.scale_GO[g], fit.zero_GO[g] = scale[0], zero[0]
            code[i] = grid.codes(left[i], fit.scale_GO[g], fit.zero_GO[g])
            nearest = (code[i] - fit.zero_GO[g]).mul_(fit.scale_GO[g])
            torch.div(left[i] - nearest, factor[i, i], out=wrong[i - start])
            left[i + 1 : end].addr_(factor[i, i + 1 : end], wrong[i - start], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, wrong, alpha=-1)
    if metric.order_I is not None:
        fit.code_IO[metric.order_I] = code
    return fit


def _sweep(w_IO: Tensor, fit: _Fit, damped_II: Tensor, grid: _Grid, block: int) -> None:
    """Choose each code again, with all others as they are, for the least error of its row."""
    wrong_IO = w_IO - fit.restored(grid.group)
    pull_IO = damped_II @ wrong_IO
    for start in range(0, len(w_IO), block):
        end = min(start + block, len(w_IO))
        moved = torch.empty_like(w_IO[start:end])
        for i in range(start, end):
            g = i // grid.group
            old = (fit.code_IO[i] - fit.zero_GO[g]).mul_(fit.scale_GO[g])
            best = old + pull_IO[i] / damped_II[i, i]
            fit.code_IO[i] = grid.codes(best, fit.scale_GO[g], fit.zero_GO[g])
            new = (fit.code_IO[i] - fit.zero_GO[g]).mul_(fit.scale_GO[g])
            torch.sub(new, old, out=moved[i - start])
            pull_IO[start:end].addr_(damped_II[start:end, i], moved[i - start], alpha=-1)
        pull_IO[end:].addmm_(damped_II[end:, start:end], moved, alpha=-1)


def _refit(w_IO: Tensor, fit: _Fit, damped_II: Tensor, grid: _Grid) -> None:
    """Give each row the scales of least squared error for its codes, unless rounding them undoes the gain."""
    steps_IO = fit.steps(grid.group)
    scale_GO = torch.empty_like(fit.scale_GO)
    n_groups, n_out = scale_GO.shape
    for rows in _chunks(n_out, n_groups * n_groups, w_IO.device):
        scale_GO[:, rows] = _least_squares(w_IO[:, rows], steps_IO[:, rows], damped_II, grid.group)
    scale_GO = torch.where(scale_GO.isfinite(), scale_GO, fit.scale_GO)
    refitted = _Fit(fit.code_IO, grid.stored(scale_GO), fit.zero_GO)
    before = _weigh(fit.restored(grid.group) - w_IO, damped_II)
    after = _weigh(refitted.restored(grid.group) - w_IO, damped_II)
    fit.scale_GO = torch.where(after < before, refitted.scale_GO, fit.scale_GO)


def _least_squares(w_IO: Tensor, steps_IO: Tensor, damped_II: Tensor, group: int) -> Tensor:
    """Return the scales [G, O] of least weighed error of steps * scale; nan where any will do, or none."""
    n_groups = -(-len(w_IO) // group)
    product_OGG = w_IO.new_empty(w_IO.shape[1], n_groups, n_groups)
    for g in range(n_groups):
        its = slice(g * group, (g + 1) * group)
        product_OGG[:, g] = _summed(steps_IO * (damped_II[:, its] @ steps_IO[its]), group).T
    target_OG = _summed(steps_IO * (damped_II @ w_IO), group).T
    empty_OG = product_OGG.diagonal(dim1=1, dim2=2) <= 0  # all of a group's steps are 0
    product_OGG.diagonal(dim1=1, dim2=2).add_(empty_OG)
    lower, info = torch.linalg.cholesky_ex(product_OGG)
    solved_OG = torch.cholesky_solve(target_OG[..., None], lower).squeeze(2)
    return solved_OG.masked_fill(empty_OG | (info != 0)[:, None], torch.nan).T


def _summed(x_IO: Tensor, group: int) -> Tensor:
    """Return the sum of each group [G, O]."""
    padded = F.pad(x_IO, (0, 0, 0, -len(x_IO) % group))
    return padded.view(-1, group, x_IO.shape[1]).sum(1)


def _weigh(wrong_IO: Tensor, hessian_II: Tensor) -> Tensor:
    """Return e^T H e of each row's errors e [O]."""
    return (hessian_II @ wrong_IO).mul_(wrong_IO).sum(0)


def _blocks(n_in: int, group: int, block: int, is_static: bool) -> Iterator[tuple[int, int]]:
    """Cut columns so that errors of all before are in a group's weights when its scale is chosen."""
    if group <= block and not is_static:
        block -= block % group
    reach = n_in if is_static or group <= block else group
    for first in range(0, n_in, reach):
        last = min(first + reach, n_in)
        for start in range(first, last, block):
            yield start, min(start + block, last)


def _spread(x_GO: Tensor, group: int, n_in: int) -> Tensor:
    return x_GO.repeat_interleave(group, 0)[:n_in]


def _chunks(n_rows: int, row_elements: int, device: torch.device) -> Iterator[slice]:
    n_at_once = max(1, _CHUNK_ELEMENTS[device.type] // row_elements)
    for start in range(0, n_rows, n_at_once):
        yield slice(start, start + n_at_once)
