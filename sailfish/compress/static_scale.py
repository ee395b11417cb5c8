"""Chooses one scale for all activations of a layer's input, from a histogram of what calibration saw."""

from __future__ import annotations

import torch
from torch import Tensor

from sailfish.base.errors import BuildError
from sailfish.compress.recipe import Static
from sailfish.compress.rtn import LARGEST_8, Format8

_N_BINS = 4096
_N_LIMITS = 512
_N_LEVELS = 128
"""Of int8 on one side of 0."""
_STEP_BINS = 8
"""Between ranges whose entropy is compared: at 4096 bins as fine as the last 128 levels themselves."""
_EXACT_COUNT = 1 << 24
"""float32, in which histc counts, holds no greater whole numbers."""


class Magnitudes:
    """A histogram of absolute values whose range doubles as larger ones come."""

    def __init__(self) -> None:
        self.largest = 0.0
        self._count_J = torch.zeros(_N_BINS, dtype=torch.float64)
        self._range = 0.0

    def add(self, x: Tensor) -> None:
        """Count the values of a tensor of any shape and device. BuildError if one is not finite."""
        values = x.detach().flatten()
        for start in range(0, len(values), _EXACT_COUNT):
            magnitude = values[start : start + _EXACT_COUNT].float().abs()
            largest = float(magnitude.amax())
            if not largest < float("inf"):
                raise BuildError("the activations that a layer is calibrated with are not finite")
            self.largest = max(self.largest, largest)
            self._range = self._range or largest
            while self._range < largest:
                half = self._count_J.view(-1, 2).sum(1)
                self._count_J = torch.cat([half, torch.zeros_like(half)])
                self._range *= 2
            if self._range:
                self._count_J += magnitude.histc(_N_BINS, 0, self._range).double().cpu()
            else:
                self._count_J[0] += len(magnitude)

    def bins(self) -> tuple[Tensor, float]:
        """Return the counts up to the largest value, float64 on the host, and a bin's width."""
        filled = self._count_J.nonzero()
        n_used = int(filled[-1]) + 1 if len(filled) else 1
        return self._count_J[:n_used], self._range / _N_BINS


def static_scale(seen: Magnitudes, how: Static, to: Format8) -> float:
    """Return the scale that 8-bit values are multiplied with: the method's limit over the largest value.

    What lies beyond the limit is cut off. "percentile" keeps a share of all values, "mse" takes the limit of
    least squared error, "entropy" that of least information lost (Migacz 2017), int8 only. 1 where nothing
    but zeros were seen.
    """
    if seen.largest == 0:
        return 1.0
    if how.method == "min-max":
        limit = seen.largest
    elif how.method == "percentile":
        limit = _percentile(seen, how.kept)
    elif how.method == "mse":
        limit = _least_squares(seen, to)
    else:
        limit = _least_divergence(seen)
    return min(limit, seen.largest) / LARGEST_8[to]


def _percentile(seen: Magnitudes, kept_frac: float) -> float:
    """Return the edge of the bin in which the last value to be kept lies."""
    count_J, width = seen.bins()
    below_J = count_J.cumsum(0)
    return (int((below_J < kept_frac * below_J[-1]).sum()) + 1) * width


def _least_squares(seen: Magnitudes, to: Format8) -> float:
    """Try many limits, every value taken for the middle of its bin."""
    count_J, width = seen.bins()
    middle_J = (torch.arange(len(count_J), dtype=torch.float64) + 0.5) * width
    limit_C = seen.largest * torch.arange(1, _N_LIMITS + 1, dtype=torch.float64) / _N_LIMITS
    scale_C1 = limit_C[:, None] / LARGEST_8[to]
    scaled_CJ = (middle_J / scale_C1).clamp(max=LARGEST_8[to])
    if to == "int8":
        rounded_CJ = scaled_CJ.round()
    else:
        rounded_CJ = scaled_CJ.float().to(torch.float8_e4m3fn).double()
    error_C = ((rounded_CJ * scale_C1 - middle_J).square() * count_J).sum(1)
    return float(limit_C[error_C.argmin()])


def _least_divergence(seen: Magnitudes) -> float:
    """Return the limit whose 128 levels say most of the distribution that is cut off there.

    P are the bins below the limit, all beyond it counted to the last one; Q are the same bins without
    those, spread evenly over the filled bins of each level; compared by KL(P | Q). The first bin, most
    of it exact zeros that every scale keeps, counts as much as the second.
    """
    count_J, width = seen.bins()
    if len(count_J) <= _N_LEVELS:
        return len(count_J) * width
    count_J = torch.cat([count_J[1:2], count_J[1:]])
    end_C = torch.arange(len(count_J), _N_LEVELS - 1, -_STEP_BINS)
    bin_J = torch.arange(len(count_J))
    is_below_CJ = bin_J < end_C[:, None]
    p_CJ = count_J * is_below_CJ
    level_CJ = (bin_J * _N_LEVELS // end_C[:, None]).clamp(max=_N_LEVELS - 1)
    filled_CJ = (p_CJ > 0).double()
    sums_CL = torch.zeros((len(end_C), _N_LEVELS), dtype=torch.float64)
    mean_CL = sums_CL.scatter_add(1, level_CJ, p_CJ) / sums_CL.scatter_add(1, level_CJ, filled_CJ).clamp(
        min=1
    )
    q_CJ = mean_CL.gather(1, level_CJ) * filled_CJ
    beyond_C = count_J.sum() - p_CJ.sum(1)
    p_CJ.scatter_add_(1, end_C[:, None] - 1, beyond_C[:, None])
    p_CJ /= p_CJ.sum(1, keepdim=True)
    q_CJ /= q_CJ.sum(1, keepdim=True)
    divergence_C = torch.where(p_CJ > 0, p_CJ * (p_CJ / q_CJ).log(), 0.0).sum(1).nan_to_num(nan=torch.inf)
    return float(end_C[divergence_C.argmin()]) * width
