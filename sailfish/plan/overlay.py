"""What only the device itself can tell a plan, measured there at an engine's first start."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOverlay:
    """Measurements of one device for one engine."""

    device_key: str
    """HardwareProfile.key of the device that was measured."""
    software: str
    """What was measured with, such as "torch 2.11.0+cu130"; another version is measured again."""
    runtime_bytes: int
    """Memory of the process outside weights, KV blocks, activations and workspaces."""
    launches: dict[int, dict[str, int]] = field(default_factory=dict)
    """Launches of each kernel in a captured decode of up to so many sequences."""
