"""Moves the difficulty of rounding from activations to weights (SmoothQuant, Xiao et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sailfish.base.errors import BuildError, ConfigError
from sailfish.compress.fold import scale_inputs
from sailfish.compress.rtn import quantise_8, restore_8

ALPHAS = (0.0, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
"""Shares of the activations' range that are tried; 0.5 and 0.8 are the paper's."""
_LARGEST = 127.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothed:
    """Scales that a search chose, and what they gain on its tokens."""

    scale_I: Tensor
    """float32; all 1 where no migration was best."""
    alpha: float | None
    """None: no migration."""
    error: float
    """Squared error of the outputs over their squares, all layers together."""
    error_before: float
    """The same without migration."""


def smooth_scale(largest_I: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """Return scale_I = max|x|^alpha / max|w|^(1 - alpha), float32 (equation 4).

    largest_I is the largest absolute value of each input over the calibration tokens; weights [O, I] are
    those of all layers that read the inputs. Inputs to divide by scale_I, weights to multiply. An input
    that is always 0, or that no weight reads, has scale 1. ConfigError if alpha is not a share.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"a migration of {alpha:g} is not possible", hint="it is a share from 0 to 1")
    x_I = largest_I.float()
    w_I = torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)
    if not bool((x_I.isfinite() & w_I.isfinite()).all()):
        raise BuildError("some weights or activations to smooth are not finite")
    is_used = (x_I > 0) & (w_I > 0)
    scale = torch.where(is_used, x_I, 1.0) ** alpha / torch.where(is_used, w_I, 1.0) ** (1 - alpha)
    return scale.clamp(1e-5, 1e5)


def search_smooth(
    x_TI: Tensor,
    weights: Sequence[Tensor],
    *,
    largest_I: Tensor | None = None,
    alphas: Sequence[float] = ALPHAS,
    tied: Callable[[Tensor], Tensor] = lambda scale_I: scale_I,
) -> Smoothed:
    """Return the migration of least output error in int8, among `alphas` and none at all.

    Weights are rounded per row, activations per token. x_TI are some calibration tokens, largest_I the
    largest absolute values of all of them (else of these). `tied` turns scales into such as the producer
    can be divided by.
    """
    largest_I = x_TI.abs().amax(0) if largest_I is None else largest_I
    x_TI = x_TI.float()
    outputs = [x_TI @ weight.float().T for weight in weights]
    total = sum(float(y.square().sum(dtype=torch.float64)) for y in outputs)

    def error(scale_I: Tensor) -> float:
        rounded_TI = round_tokens(x_TI / scale_I)
        wrong = 0.0
        for weight, y_TO in zip(weights, outputs, strict=True):
            restored = restore_8(*quantise_8(scale_inputs(weight, scale_I), "int8"))
            wrong += float((rounded_TI @ restored.T - y_TO).square().sum(dtype=torch.float64))
        return wrong / total if total else 0.0

    best_scale, best_alpha = torch.ones_like(x_TI[0]), None
    best = before = error(best_scale)
    for alpha in alphas:
        scale_I = tied(smooth_scale(largest_I, weights, alpha))
        its_error = error(scale_I)
        if its_error < best:
            best_scale, best_alpha, best = scale_I, alpha, its_error
    return Smoothed(scale_I=best_scale, alpha=best_alpha, error=best, error_before=before)


def round_tokens(x_TI: Tensor) -> Tensor:
    """Return what int8 with one scale per token keeps of float32 activations."""
    largest_T1 = x_TI.abs().amax(1, keepdim=True)
    scale_T1 = torch.where(largest_T1 == 0, 1.0, largest_T1 / _LARGEST)
    return (x_TI / scale_T1).round() * scale_T1
