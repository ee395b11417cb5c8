"""What the CPU's own library of kernels does. No torch."""

from __future__ import annotations

from types import MappingProxyType

from sailfish.kernels.contract import Impl
from sailfish.kernels.cpu.limits import int4_bytes, int8_bytes, rejects_int4, rejects_int8

CPU: MappingProxyType[str, tuple[Impl, ...]] = MappingProxyType(
    {
        "linear_int4": (
            Impl(
                op="linear_int4",
                name="cpu_int4",
                entry="sailfish.kernels.cpu.int4:linear_int4",
                why="reads 4 bits at the memory's rate and multiplies integers: activations are rounded to 8 "
                "bits, each group of inputs by itself, which moves products by about 0.6%",
                rejects=rejects_int4,
                workspace_bytes=int4_bytes,
            ),
        ),
        "linear_int8": (
            Impl(
                op="linear_int8",
                name="cpu_int8",
                entry="sailfish.kernels.cpu.linear8:linear_int8",
                why="reads 8 bits at the memory's rate and sums integers exactly",
                rejects=rejects_int8,
                workspace_bytes=int8_bytes,
            ),
        ),
    }
)
"""Implementations of each op, tried in this order."""
