"""What the CPU's own library of kernels does. No torch."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from sailfish.kernels.contract import Case, Impl
from sailfish.kernels.cpu.limits import (
    bf16_bytes,
    int4_bytes,
    int8_bytes,
    rejects_bf16,
    rejects_gated,
    rejects_int4,
    rejects_int8,
)

CPU: MappingProxyType[str, tuple[Impl, ...]] = MappingProxyType(
    {
        "linear": (
            Impl(
                op="linear",
                name="cpu_bf16",
                entry="sailfish.kernels.cpu.bf16:linear_bf16",
                why="as exact as torch's product and faster where it is chosen",
                rejects=rejects_bf16,
                workspace_bytes=bf16_bytes,
            ),
        ),
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


def gated_on_cpu(linear: str) -> Impl:
    """Return the library's product as it does `norm_{linear}`: a norm apart, the activation at its end."""
    [impl] = CPU[linear]

    def rejects(case: Case) -> str | None:
        return impl.rejects(case) or rejects_gated(case)

    return replace(
        impl,
        op=f"norm_{linear}",
        name=f"{impl.name}_gated",
        adapter="sailfish.kernels.composed:gated",
        why="activates what it multiplied while it is in the caches",
        rejects=rejects,
    )
