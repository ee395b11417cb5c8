"""What only the device itself can tell a plan, measured there at an engine's first start."""

from __future__ import annotations

from dataclasses import dataclass

from sailfish.kernels.contract import Choice


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOverlay:
    """Measurements and choices of one device for one engine."""

    device_key: str
    """HardwareProfile.key of the device that was measured."""
    runtime_bytes: int
    """Memory of the process outside weights, KV blocks, activations and workspaces."""
    op_choices: tuple[Choice, ...] = ()
    """Implementations bound on the device."""
    software: str = ""
    """What was measured with, such as "torch 2.11.0+cu130, driver 580.65"."""
