"""Copies between host and device that do not make the host wait."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(values: Any, device: torch.device, dtype: Any = np.int64) -> Tensor:
    """Return host numbers (a list or array) as a device tensor, through pinned memory on CUDA."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def download(tensor: Tensor) -> Tensor:
    """Return a host tensor that holds the values once the device has passed this point of its stream."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
