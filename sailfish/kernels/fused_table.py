"""Who does a product together with the norm before it and the activation behind it. No torch."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from sailfish.kernels.contract import Case, Choice, Impl
from sailfish.kernels.cpu_table import gated_on_cpu
from sailfish.kernels.cuda.linear8_limits import rejects_wide, rejects_wide_bf16
from sailfish.kernels.cuda.linear_limits import (
    rejects_stream_bf16,
    rejects_stream_int4,
    rejects_stream_norm,
    rejects_wide_int4,
    stream_bytes,
    wide_int4_bytes,
)
from sailfish.kernels.plain.limits import none_bytes

_COMPOSED = "sailfish.kernels.composed:"
_STREAM = "sailfish.kernels.cuda.stream:"
_NORMED_AND_GATED = _COMPOSED + "normed_and_gated"
_STRIP = 16
NORMED_ROWS = 1
"""In whole steps of 8 layers of an 8B shape in 4 bits on an H200: 588 instead of 603 us at one row, 705
instead of 651 at four."""
QUANTISED_ROWS = 64
"""In whole steps of 8 layers of an 8B shape in fp8 8 us more at 32 rows, 4 less at 64, 15 at 128."""
COMPOSED = "one_by_one"
"""The implementation that calls the chosen norm, linear and activation."""

Rejects = Callable[[Case], str | None]


def _of_cuda(rejects: Rejects) -> Rejects:
    def fused(case: Case) -> str | None:
        if not case.target.startswith("sm_"):
            return f"made for CUDA, the target is {case.target}"
        if case.activation and case.n_out % _STRIP:
            return f"gate and up do not take turns of 8 in {case.n_out} outputs"
        return rejects(case)

    return fused


def _gated(
    op: str, name: str, entry: str, rejects: Rejects, n_bytes: Callable[..., int] = none_bytes
) -> Impl:
    """Return a product that activates what it multiplied, of norms that another launch makes."""

    def gated(case: Case) -> str | None:
        return rejects(case) if case.activation else "there is no activation behind this product"

    return Impl(
        op=op,
        name=name,
        entry=entry,
        adapter=_COMPOSED + "gated",
        why="activates what it multiplied, on the way out of the product",
        rejects=_of_cuda(gated),
        workspace_bytes=n_bytes,
        can_capture=True,
    )


def _whole(op: str, name: str, entry: str, rejects: Rejects) -> Impl:
    """Return a streamed product whose blocks make the norm for themselves."""
    return Impl(
        op=op,
        name=name,
        entry=entry,
        adapter=_NORMED_AND_GATED,
        why="norm, product and activation in one launch: of few rows every block makes the norm",
        rejects=_of_cuda(lambda case: _rejects_rows(case) or rejects(case) or rejects_stream_norm(case)),
        workspace_bytes=stream_bytes,
        can_capture=True,
    )


def _rejects_rows(case: Case) -> str | None:
    if case.max_rows is not None and case.max_rows <= NORMED_ROWS:
        return None
    return "with more rows than one the norm of every block takes longer than a launch"


def _rejects_wide_8(case: Case) -> str | None:
    if case.max_rows is not None and case.max_rows <= QUANTISED_ROWS:
        return f"up to {QUANTISED_ROWS} rows the activation that quantises takes no longer than who only does"
    return rejects_wide(case)


def _one_by_one(op: str) -> Impl:
    return Impl(
        op=op,
        name=COMPOSED,
        entry=_COMPOSED + "norm_linear",
        why="the norm, the linear and the activation that are chosen, one by one",
        rejects=lambda _: None,
        workspace_bytes=none_bytes,  # what they take counts as theirs
        can_capture=True,
    )


def _of_8_bits(format: str, *others: Impl) -> tuple[Impl, ...]:
    op = f"norm_linear_{format}"
    return (
        _gated(op, f"cuda_wide_{format}_gated", "sailfish.kernels.cuda.linear8:wide_linear", _rejects_wide_8),
        *others,
        _one_by_one(op),
    )


def launches_saved(choice: Choice, *, is_quantised: bool) -> int:
    """Return how many launches a call of a fused product takes fewer than its ops one by one.

    is_quantised: what it returns goes on in 8 bits, which the activation stores in its own launch: who
    activates in the product has another launch quantise instead.
    """
    impl = next((i for i in FUSED[choice.op] if i.name == choice.implementation), None)
    if impl is None or not impl.adapter:
        return 0
    is_activated = bool(choice.activation) and not is_quantised
    return is_activated + (impl.adapter == _NORMED_AND_GATED)


FUSED: MappingProxyType[str, tuple[Impl, ...]] = MappingProxyType(
    {
        "norm_linear": (
            _whole(
                "norm_linear", "cuda_stream_bf16_fused", _STREAM + "norm_linear_bf16", rejects_stream_bf16
            ),
            _gated(
                "norm_linear",
                "cuda_stream_bf16_gated",
                _STREAM + "linear_bf16",
                rejects_stream_bf16,
                stream_bytes,
            ),
            _gated(
                "norm_linear",
                "cuda_wide_bf16_gated",
                "sailfish.kernels.cuda.wide_bf16:linear_bf16",
                rejects_wide_bf16,
            ),
            gated_on_cpu("linear"),
            _one_by_one("norm_linear"),
        ),
        "norm_linear_int4": (
            _whole(
                "norm_linear_int4",
                "cuda_stream_int4_fused",
                _STREAM + "norm_linear_int4",
                rejects_stream_int4,
            ),
            _gated(
                "norm_linear_int4",
                "cuda_stream_int4_gated",
                _STREAM + "linear_int4",
                rejects_stream_int4,
                stream_bytes,
            ),
            _gated(
                "norm_linear_int4",
                "cuda_wide_int4_gated",
                "sailfish.kernels.cuda.wide:linear_int4",
                rejects_wide_int4,
                wide_int4_bytes,
            ),
            gated_on_cpu("linear_int4"),
            _one_by_one("norm_linear_int4"),
        ),
        "norm_linear_int8": _of_8_bits("int8", gated_on_cpu("linear_int8")),
        "norm_linear_fp8": _of_8_bits("fp8"),
    }
)
"""Implementations tried in this order."""
