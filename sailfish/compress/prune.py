"""Chooses the weights that become zero, and lets the others make up for them.

Masks by magnitude and by Wanda say True where a weight is kept; SparseGPT also changes the kept weights,
and rounds them in the same pass where asked to. CPU and CUDA tensors of any float dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from sailfish.base.errors import BuildError, ConfigError

_TINY = 1e-30
"""Stands for 0 where it would divide."""
_MOST_DAMPING = 1.0
"""Times the mean of the Hessian's diagonal; beyond it little but the diagonal would be left."""


@dataclass(frozen=True, slots=True)
class Share:
    """Zeros wherever they cost least. ConfigError if the share is not one."""

    zeros_frac: float

    def __post_init__(self) -> None:
        if not 0 <= self.zeros_frac < 1:
            raise ConfigError(
                f"a share of zeros of {self.zeros_frac:g} is not possible",
                hint="it is at least 0 and less than 1: 0.5 for every second weight",
            )


@dataclass(frozen=True, slots=True)
class Blocks:
    """`keep` weights of every `of` neighbours in a row: 2 of 4, 4 of 8. ConfigError if that cannot be."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.keep <= self.of:
            raise ConfigError(f"{self.keep} of {self.of} weights cannot be kept", hint="2 of 4 can")


Sparsity = Share | Blocks


class Rounding(Protocol):
    """Rounds weights while SparseGPT walks over the columns."""

    group: int | None
    """Columns that share a scale; None: all."""

    def fit(self, weight_OJ: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what rounds one column w_O of the next group, whose weights are now weight_OJ.

        Weights that will probably be pruned are 0 there. 0 must round to 0.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What SparseGPT leaves of a weight."""

    weight_OI: Tensor
    """In its dtype; in the Hessian's where it was rounded. Exactly 0 where not kept."""
    keep_OI: Tensor
    """bool."""
    damp_frac: float
    """More than was asked for where the Hessian could not be inverted with less."""


def keep_mask(score_OI: Tensor, sparsity: Sparsity, within: Literal["row", "matrix"]) -> Tensor:
    """Return True where scores are high: as many in each row, or in the matrix, as the sparsity keeps.

    Counts are exact; of equal scores the first are dropped. Blocks lie within a row in either case.
    ConfigError if a row is not whole blocks, BuildError if a score is not a number.
    """
    _refuse_odd_rows(score_OI.shape[1], sparsity)
    if bool(score_OI.isnan().any()):
        raise BuildError("some weights or statistics to prune by are not numbers")
    return _mask(score_OI, sparsity, within)


def magnitude_mask(weight_OI: Tensor, sparsity: Sparsity) -> Tensor:
    """Keep the largest weights of the matrix or of each block (Han et al. 2015)."""
    return keep_mask(weight_OI.abs(), sparsity, "matrix")


def wanda_mask(weight_OI: Tensor, mean_square_I: Tensor, sparsity: Sparsity) -> Tensor:
    """Keep the weights of largest |w| ||x|| in each row or block (Sun et al. 2023, section 3).

    mean_square_I is that of each input over the calibration tokens: the diagonal of the Hessian.
    """
    return keep_mask(weight_OI.abs() * mean_square_I.sqrt(), sparsity, "row")


def sparsegpt(
    weight_OI: Tensor,
    hessian_II: Tensor,
    sparsity: Sparsity,
    *,
    damp_frac: float = 0.01,
    block: int = 128,
    rounding: Rounding | None = None,
) -> Pruned:
    """Prune column after column, each error made good by the columns behind it (Frantar & Alistarh 2023).

    hessian_II is the mean of x x^T over the calibration tokens, times anything; all is computed in its
    dtype. Inputs that are always 0 lose their weights. Of a share of zeros each `block` columns of all rows
    together take as many as Wanda's scores put there: the paper gives each the same, though some inputs,
    those of an attention head, say, weigh less than others. Blocks are chosen when the walk reaches them.
    ConfigError if `block` does not fit the sparsity's blocks or the rounding's groups, BuildError if
    something is not finite.
    """
    n_in = weight_OI.shape[1]
    _refuse_misfits(n_in, block, sparsity, rounding)
    if not bool(weight_OI.isfinite().all()):
        raise BuildError("some weights to prune are not finite")
    u_II, damp_frac = inverse_factor(hessian_II, damp_frac)
    walk = _Walk(weight_OI, hessian_II.diagonal(), u_II, sparsity, rounding)
    walk.w_IO[hessian_II.diagonal() == 0] = 0
    for start in range(0, n_in, block):
        end = min(start + block, n_in)
        error_JO = walk.columns(start, end)
        walk.w_IO[end:] -= u_II[start:end, end:].T @ error_JO
    weight = walk.w_IO.T.contiguous()
    return Pruned(
        weight_OI=weight.to(weight_OI.dtype) if rounding is None else weight,
        keep_OI=walk.keep_IO.T.contiguous(),
        damp_frac=damp_frac,
    )


def inverse_factor(hessian_II: Tensor, damp_frac: float) -> tuple[Tensor, float]:
    """Return the upper U with U^T U = (H + damping)^-1, and the damping that it took.

    Damping is a share of the mean diagonal, ten times more as often as H stays singular; inputs that are
    always 0 have a 1 there. BuildError if H is not finite, or singular with all damping.

    Of the matrix turned by 180 degrees the lower factor's inverse, turned back, is U: one factorisation
    where the papers take three, and nothing is lost by inverting twice.
    """
    diagonal = hessian_II.diagonal()
    if not bool(hessian_II.isfinite().all()):
        raise BuildError("the activations that a layer is calibrated with are not finite")
    is_dead = diagonal == 0
    mean = diagonal.sum() / (~is_dead).sum().clamp(min=1)
    identity = torch.eye(len(hessian_II), dtype=hessian_II.dtype, device=hessian_II.device)
    while True:
        added = torch.where(is_dead, 1.0, damp_frac * mean)
        lower, failed = torch.linalg.cholesky_ex((hessian_II + added.diag()).flip(0, 1))
        if not bool(failed):
            return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1), damp_frac
        if damp_frac >= _MOST_DAMPING:
            raise BuildError(f"a layer's Hessian cannot be inverted even with {damp_frac:g} of damping")
        damp_frac = min(max(10 * damp_frac, 1e-4), _MOST_DAMPING)


def refit(weight_OI: Tensor, pruned: Pruned, hessian_II: Tensor, n_steps: int = 10) -> Tensor:
    """Return the kept weights moved towards the least error of all outputs, the others 0.

    The walk makes errors good by the columns behind alone; with the mask known every kept weight can. By
    conjugate gradients (Hestenes & Stiefel 1952) of all rows at once from the pruned weights, scaled by the
    damped Hessian's diagonal: no step raises a row's error. Computed in the Hessian's dtype.
    """
    diagonal_I = hessian_II.diagonal()
    damped_II = hessian_II + (pruned.damp_frac * diagonal_I.mean()).expand(len(hessian_II)).diag()
    scale_I = damped_II.diagonal().clamp(min=_TINY)
    w_OI = pruned.weight_OI.to(hessian_II.dtype)
    left_OI = ((weight_OI.to(hessian_II.dtype) - w_OI) @ damped_II) * pruned.keep_OI
    step_OI = left_OI / scale_I
    size_O1 = (left_OI * step_OI).sum(1, keepdim=True)
    for _ in range(n_steps):
        pull_OI = (step_OI @ damped_II) * pruned.keep_OI
        length_O1 = size_O1 / (step_OI * pull_OI).sum(1, keepdim=True).clamp(min=_TINY)
        w_OI = w_OI + length_O1 * step_OI
        left_OI = left_OI - length_O1 * pull_OI
        scaled_OI = left_OI / scale_I
        before_O1, size_O1 = size_O1, (left_OI * scaled_OI).sum(1, keepdim=True)
        step_OI = scaled_OI + size_O1 / before_O1.clamp(min=_TINY) * step_OI
    return w_OI.to(weight_OI.dtype)


class _Walk:
    """Weights that are changed in place; a column of the layer is a row here, to lie in one piece."""

    def __init__(
        self,
        weight_OI: Tensor,
        mean_square_I: Tensor,
        u_II: Tensor,
        sparsity: Sparsity,
        rounding: Rounding | None,
    ) -> None:
        self.w_IO = weight_OI.to(u_II.dtype).T.clone(memory_format=torch.contiguous_format)
        self.keep_IO = torch.ones_like(self.w_IO, dtype=torch.bool)
        self._u_II = u_II
        self._sparsity = sparsity
        self._n_zeros = [0]
        """Of the columns before each, where zeros are a share."""
        if isinstance(sparsity, Share):
            kept_IO = _mask(self.w_IO.square() * mean_square_I[:, None], sparsity, "matrix")
            self._n_zeros += (~kept_IO).sum(1).cumsum(0).tolist()
        self._rounding = rounding
        self._group = len(u_II) if rounding is None or rounding.group is None else rounding.group
        self._rounded: Callable[[Tensor], Tensor] = lambda w_O: w_O.to(weight_OI.dtype).to(u_II.dtype)

    def columns(self, start: int, end: int) -> Tensor:
        """Prune the columns from start to end, each divided error told to those behind; return the errors."""
        w_IO, u_II, sparsity = self.w_IO, self._u_II, self._sparsity
        error_JO = torch.empty_like(w_IO[start:end])
        if isinstance(sparsity, Share):
            self.keep_IO[start:end] = self._share(start, end)
        for i in range(start, end):
            if isinstance(sparsity, Blocks) and i % sparsity.of == 0:
                self.keep_IO[i : i + sparsity.of] = self._best(i, i + sparsity.of)
            if self._rounding is not None and i % self._group == 0:
                kept_JO = self._best(i, min(i + self._group, len(w_IO)))
                self._rounded = self._rounding.fit((w_IO[i : i + self._group] * kept_JO).T)
            new_O = torch.where(self.keep_IO[i], self._rounded(w_IO[i]), 0.0)
            error_JO[i - start] = (w_IO[i] - new_O) / u_II[i, i]
            w_IO[i] = new_O
            w_IO[i + 1 : end].addcmul_(u_II[i, i + 1 : end, None], error_JO[i - start], value=-1)
        return error_JO

    def _score(self, start: int, end: int) -> Tensor:
        """Return the error that each pruned weight would leave (Hassibi & Stork 1993)."""
        return (self.w_IO[start:end] / self._u_II.diagonal()[start:end, None]).square()

    def _best(self, start: int, end: int) -> Tensor:
        return _mask(self._score(start, end).T, self._sparsity, "matrix").T

    def _share(self, start: int, end: int) -> Tensor:
        """Keep the weights of highest score, all but as many as are to become zero here."""
        score_JO = self._score(start, end)
        n_kept = score_JO.numel() - (self._n_zeros[end] - self._n_zeros[start])
        return _highest(score_JO.reshape(1, -1), n_kept).view_as(score_JO)


def _mask(score_OI: Tensor, sparsity: Sparsity, within: Literal["row", "matrix"]) -> Tensor:
    """Do what keep_mask does, of scores that are known to be numbers: nothing here waits for a GPU."""
    if isinstance(sparsity, Blocks):
        return _highest(score_OI.reshape(-1, sparsity.of), sparsity.keep).view(score_OI.shape)
    rows = score_OI if within == "row" else score_OI.reshape(1, -1)
    n_all = rows.shape[1]
    return _highest(rows, n_all - round(sparsity.zeros_frac * n_all)).view(score_OI.shape)


def _highest(rows: Tensor, n: int) -> Tensor:
    """Return True for the n highest of each row, of equal ones the last."""
    lowest = rows.sort(dim=1, stable=True).indices[:, : rows.shape[1] - n]
    return torch.ones_like(rows, dtype=torch.bool).scatter_(1, lowest, False)


def _refuse_odd_rows(n_in: int, sparsity: Sparsity) -> None:
    if isinstance(sparsity, Blocks) and n_in % sparsity.of:
        raise ConfigError(f"a row of {n_in} weights is not whole blocks of {sparsity.of}")


def _refuse_misfits(n_in: int, block: int, sparsity: Sparsity, rounding: Rounding | None) -> None:
    _refuse_odd_rows(n_in, sparsity)
    of = sparsity.of if isinstance(sparsity, Blocks) else 1
    if block < 1 or block % of:
        raise ConfigError(f"steps of {block} columns are not whole blocks of {of} weights")
    group = n_in if rounding is None or rounding.group is None else rounding.group
    if group < n_in and ((block % group and group % block) or group % of):
        raise ConfigError(f"groups of {group} inputs do not fit steps of {block} and blocks of {of} weights")
