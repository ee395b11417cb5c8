"""Finds the device that a command works on, and the dtype of its activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from sailfish.base.errors import ConfigError
from sailfish.compress.block import Device
from sailfish.hardware.probe import probe
from sailfish.hardware.profile import HardwareProfile
from sailfish.plan.types import Dtype

_DTYPES = ("float32", "bfloat16")


def find_device(
    device: str | None, dtype: str | None, environ: Mapping[str, str]
) -> tuple[Device, HardwareProfile]:
    """Return this machine's `device`; None takes a GPU if one is there, and the dtype that is usual on it.

    ConfigError where the device is not here, or a dtype is none of those that models run in.
    """
    hardware = probe(device, environ=environ)
    if dtype is None:
        dtype = "float32" if hardware.device == "cpu" else "bfloat16"
    if dtype not in _DTYPES:
        raise ConfigError(
            f"dtype {dtype!r} is not supported", hint=f"use {' or '.join(_DTYPES)}", param="dtype"
        )
    return Device(target=hardware.target, dtype=cast("Dtype", dtype)), hardware
