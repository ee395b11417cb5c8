"""Searches scales and clipping that keep what salient inputs multiply (AWQ, Lin et al. 2023).

Errors are those of the layer's outputs over all calibration tokens, by the mean of x x^T: no tokens are
kept, and none are sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.base.errors import BuildError
from sailfish.compress.fold import scale_inputs

Rounded = Callable[[Tensor], Tensor]
"""float32 weights [O, I] to those that a format keeps of them, rows and groups apart from one another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """Scales that a search chose, and what they gain."""

    scale_I: Tensor
    """float32; all 1 where no scaling was best."""
    alpha: float
    """Power of the activations' magnitude."""
    is_duo: bool
    """Whether the weights' magnitude, to the power of 1 - alpha, divides it."""
    error: float
    """Squared error of the outputs over their squares, all layers together."""
    error_before: float
    """The same without scaling."""


def search_scale(
    weights: Sequence[Tensor],
    hessian_II: Tensor,
    magnitude_I: Tensor,
    rounded: Rounded,
    *,
    group: int | None = None,
    n_grid: int = 20,
    tied: Callable[[Tensor], Tensor] = lambda scale_I: scale_I,
) -> Scaled:
    """Return the scale_I of least output error: weights to multiply by it, inputs to divide (equation 5).

    weights [O, I] are those of all layers that read the inputs, hessian_II the mean of x x^T, magnitude_I
    the mean of |x|. Powers alpha of the magnitude are tried in n_grid steps; with `group` also over that
    of the weights, each as a share of its group's largest. `tied` turns scales into such as the producer
    can be divided by. BuildError if something is not finite.
    """
    if not bool(hessian_II.isfinite().all() & magnitude_I.isfinite().all()):
        raise BuildError("the activations that a layer is calibrated with are not finite")
    hessian_II = hessian_II.float()
    total = sum(_squares(weight.float(), hessian_II) for weight in weights)

    def error(scale_I: Tensor) -> float:
        wrong = 0.0
        for weight in weights:
            restored = rounded(scale_inputs(weight.float(), scale_I)) / scale_I
            wrong += _squares(restored - weight.float(), hessian_II)
        return wrong / total if total else 0.0

    ones = torch.ones_like(magnitude_I, dtype=torch.float32)
    before = error(ones)
    best = Scaled(scale_I=ones, alpha=0.0, is_duo=False, error=before, error_before=before)
    for scale_I, alpha, is_duo in _candidates(weights, magnitude_I.float(), group, n_grid):
        tied_I = tied(scale_I)
        its_error = error(tied_I)
        if its_error < best.error:
            best = Scaled(scale_I=tied_I, alpha=alpha, is_duo=is_duo, error=its_error, error_before=before)
    return best


def clip(
    weight_OI: Tensor,
    hessian_II: Tensor,
    group: int | None,
    rounded: Rounded,
    *,
    least: float = 0.5,
    n_grid: int = 20,
) -> Tensor:
    """Return float32 weights, each group cut off at the share of its range of least output error.

    Shares fall from 1 to `least` in n_grid steps; a group's error is that of its own part of the outputs
    (section 4.1 and its code). `rounded` shall not search ranges by itself, or its search is refined.
    """
    n_out, n_in = weight_OI.shape
    group = n_in if group is None else group
    n_groups = -(-n_in // group)
    hessian_GII = _diagonal_blocks(hessian_II.float(), group, n_groups)
    w_OI = weight_OI.float()

    def grouped(x_OI: Tensor) -> Tensor:
        return F.pad(x_OI, (0, n_groups * group - n_in)).view(n_out, n_groups, group)

    w_OGI = grouped(w_OI)
    largest_OG1 = w_OGI.abs().amax(2, keepdim=True)
    best_OGI = w_OGI
    least_OG1 = torch.full_like(largest_OG1, torch.inf)
    for step in range(n_grid + 1):
        limit_OG1 = largest_OG1 * (1 - (1 - least) * step / n_grid)
        cut_OGI = w_OGI.clamp(-limit_OG1, limit_OG1)
        delta_OGI = grouped(rounded(cut_OGI.flatten(1)[:, :n_in])) - w_OGI
        product_GOI = torch.bmm(delta_OGI.transpose(0, 1), hessian_GII)
        error_OG1 = (product_GOI.transpose(0, 1) * delta_OGI).sum(2, keepdim=True)
        is_less = error_OG1 < least_OG1
        least_OG1 = torch.where(is_less, error_OG1, least_OG1)
        best_OGI = torch.where(is_less, cut_OGI, best_OGI)
    return best_OGI.flatten(1)[:, :n_in].contiguous()


def output_error(weight_OI: Tensor, restored_OI: Tensor, hessian_II: Tensor) -> float:
    """Return the squared error of the outputs over their squares; 0 where all outputs are 0."""
    hessian_II = hessian_II.float()
    total = _squares(weight_OI.float(), hessian_II)
    return _squares(restored_OI.float() - weight_OI.float(), hessian_II) / total if total else 0.0


def _candidates(
    weights: Sequence[Tensor], magnitude_I: Tensor, group: int | None, n_grid: int
) -> Iterator[tuple[Tensor, float, bool]]:
    """Yield (scale_I, alpha, is_duo); inputs that are always 0 have scale 1."""
    is_live_I = magnitude_I > 0
    if not bool(is_live_I.any()):
        return
    share_I = None if group is None else _mean_share(weights, group)
    for step in range(n_grid):
        alpha = step / n_grid
        if step:
            yield _centred(magnitude_I**alpha, is_live_I), alpha, False
        if share_I is not None:
            yield _centred(magnitude_I**alpha / (share_I ** (1 - alpha) + 1e-4), is_live_I), alpha, True


def _centred(scale_I: Tensor, is_live_I: Tensor) -> Tensor:
    """Put the extremes of the scales that count as far above 1 as below."""
    live = scale_I[is_live_I].clamp(min=1e-4)
    return torch.where(is_live_I, scale_I.clamp(min=1e-4) / (live.amax() * live.amin()).sqrt(), 1.0)


def _mean_share(weights: Sequence[Tensor], group: int) -> Tensor:
    """Return the mean over all rows of |w| over its group's largest."""
    n_in = weights[0].shape[1]
    n_groups = -(-n_in // group)
    total_I = torch.zeros_like(weights[0][0], dtype=torch.float32)
    for weight in weights:
        w_OGI = F.pad(weight.abs().float(), (0, n_groups * group - n_in)).view(-1, n_groups, group)
        share_OGI = w_OGI / w_OGI.amax(2, keepdim=True).clamp(min=1e-30)
        total_I += share_OGI.flatten(1)[:, :n_in].sum(0)
    return total_I / sum(len(weight) for weight in weights)


def _diagonal_blocks(hessian_II: Tensor, group: int, n_groups: int) -> Tensor:
    missing = n_groups * group - len(hessian_II)
    blocks = F.pad(hessian_II, (0, missing, 0, missing)).view(n_groups, group, n_groups, group)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _squares(weight_OI: Tensor, hessian_II: Tensor) -> float:
    """Return the mean over tokens of ||W x||^2."""
    return float(((weight_OI @ hessian_II) * weight_OI).sum(dtype=torch.float64))
