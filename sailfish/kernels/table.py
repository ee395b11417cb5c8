"""The table of ops and of who implements them, in order of preference. No torch."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from sailfish.kernels.contract import Case, Impl, Op
from sailfish.kernels.cpu_table import CPU
from sailfish.kernels.cuda.attention_limits import paged_bytes, rejects_paged
from sailfish.kernels.cuda.elementwise_limits import (
    rejects_act_mul,
    rejects_norm,
    rejects_quantise,
    rejects_rope_write,
)
from sailfish.kernels.cuda.linear8_limits import (
    dequantised_bytes,
    int_mm_bytes,
    rejects_int_mm,
    rejects_scaled_mm,
    rejects_wide,
)
from sailfish.kernels.cuda.linear_limits import (
    rejects_stream_8,
    rejects_stream_bf16,
    rejects_stream_int4,
    rejects_wide_int4,
    stream_bytes,
    wide_int4_bytes,
)
from sailfish.kernels.fused_table import FUSED
from sailfish.kernels.plain.limits import (
    math_bytes,
    moe_bytes,
    none_bytes,
    quantise_bytes,
    sdpa_bytes,
    widening_bytes,
)

_LINEAR8 = "sailfish.kernels.cuda.linear8:"
_ELEMENTWISE = "sailfish.kernels.reference.elementwise:"
_QUANTISED = "sailfish.kernels.reference.quantised:"
_ATTENTION = "sailfish.kernels.plain.attention:"

OPS: MappingProxyType[str, Op] = MappingProxyType(
    {
        op.name: op
        for op in (
            Op(
                name="rms_norm",
                reference=_ELEMENTWISE + "rms_norm",
                axes={"x": "TD", "weight": "D", "out": "TD"},
            ),
            Op(
                name="add_rms_norm",
                reference=_ELEMENTWISE + "add_rms_norm",
                axes={"x": "TD", "residual": "TD", "weight": "D", "out": "TD, TD"},
            ),
            Op(
                name="linear",
                reference=_ELEMENTWISE + "linear",
                axes={"x": "TI", "weight": "OI", "bias": "O", "out": "TO"},
            ),
            Op(name="quantise", reference=_QUANTISED + "quantise", axes={"x": "TI", "out": "TI, T"}),
            Op(
                name="quantise_static",
                reference=_QUANTISED + "quantise_static",
                axes={"x": "TI", "scale": "1", "out": "TI, T"},
            ),
            Op(
                name="linear_int4",
                reference="sailfish.kernels.int4:linear_int4",
                axes={"x": "TI", "weight": "OI", "bias": "O", "out": "TO"},
            ),
            Op(
                name="linear_int8",
                reference=_QUANTISED + "linear_8",
                axes={"x": "TI, T", "weight": "OI, O", "bias": "O", "out": "TO"},
            ),
            Op(
                name="linear_fp8",
                reference=_QUANTISED + "linear_8",
                axes={"x": "TI, T", "weight": "OI, O", "bias": "O", "out": "TO"},
            ),
            *(
                Op(
                    name=f"norm_{linear}",
                    reference="sailfish.kernels.reference.fused:norm_linear",
                    axes={"x": "TD", "norm": "TD, D", "weight": "OI", "bias": "O", "out": "TO, TD"},
                )
                for linear in ("linear", "linear_int4", "linear_int8", "linear_fp8")
            ),
            Op(
                name="rope_write",
                reference=_ELEMENTWISE + "rope_write",
                axes={
                    "qkv": "TX",
                    "q_norm": "E",
                    "k_norm": "E",
                    "table": "C2F",
                    "position": "T",
                    "kv": "NPKE, NPKE, NPK, NPK",
                    "slot": "T",
                    "out": "THE",
                },
                mutates=("kv",),
            ),
            Op(
                name="attention",
                reference="sailfish.kernels.reference.attention:attention",
                axes={"q": "THE", "kv": "NPKE, NPKE, NPK, NPK", "block_table": "RW", "out": "THE"},
            ),
            Op(
                name="act_mul",
                reference=_ELEMENTWISE + "act_mul",
                axes={"gate_up": "T2M", "out": "TM"},
            ),
            Op(
                name="moe",
                reference="sailfish.kernels.reference.moe:moe",
                axes={"x": "TD", "router": "TX", "gate_up": "X2MD", "down": "XDM", "out": "TD"},
            ),
            Op(
                name="embed",
                reference=_ELEMENTWISE + "embed",
                axes={"token": "T", "weight": "VD", "out": "TD"},
                tolerance={"float32": 0.0, "bfloat16": 0.0},
            ),
            Op(
                name="embed_int8",
                reference=_QUANTISED + "embed_int8",
                axes={"token": "T", "weight": "VD, V", "out": "TD"},
            ),
            Op(name="softcap", reference=_ELEMENTWISE + "softcap", axes={"x": "SV", "out": "SV"}),
        )
    }
)


def _only_cpu(case: Case) -> str | None:
    return None if case.target == "cpu" else f"made for the CPU, the target is {case.target}"


def _only_cuda(case: Case) -> str | None:
    return None if case.target.startswith("sm_") else f"made for CUDA, the target is {case.target}"


def _elementwise(op: str, why: str, rejects: Callable[[Case], str | None]) -> Impl:
    """Return the CUDA kernel of an op that treats each token alone."""
    return Impl(
        op=op,
        name=f"cuda_{op}",
        entry=f"sailfish.kernels.cuda.elementwise:{op}",
        why=why,
        rejects=lambda case: _only_cuda(case) or rejects(case),
        workspace_bytes=none_bytes,
        can_capture=True,
    )


def _no_softcap(case: Case) -> str | None:
    return None if case.softcap is None else f"SDPA has no score soft-cap, the model needs {case.softcap:g}"


def _accepts(case: Case) -> str | None:
    return None


def _widening(op: str, entry: str) -> Impl:
    """Return the plain product with a quantised weight, for where no kernel reads it."""
    return Impl(
        op=op,
        name="widened_rows",
        entry=f"sailfish.kernels.plain.linear:{entry}",
        why="no kernel of this device reads such weights; some rows at a time become float32",
        is_fallback=True,
        rejects=_accepts,
        workspace_bytes=widening_bytes,
        can_capture=True,
    )


def _streamed(op: str, entry: str, rejects: Callable[[Case], str | None]) -> Impl:
    """Return the product of few rows with weights that stream through the whole card once."""
    return Impl(
        op=op,
        name=f"cuda_stream_{op.removeprefix('linear_') if '_' in op else 'bf16'}",
        entry=f"sailfish.kernels.cuda.stream:{entry}",
        why="few rows: the weights stream through every multiprocessor once, near the memory's rate",
        rejects=lambda case: _only_cuda(case) or rejects(case),
        workspace_bytes=stream_bytes,
        can_capture=True,
    )


PREFERRED: MappingProxyType[str, tuple[Impl, ...]] = MappingProxyType(
    {
        "rms_norm": (_elementwise("rms_norm", "one pass, one launch, 8 bits on the way out", rejects_norm),),
        "add_rms_norm": (
            _elementwise("add_rms_norm", "adds, norms and stores in 8 bits in one launch", rejects_norm),
        ),
        "quantise": (_elementwise("quantise", "one pass over rows held in registers", rejects_quantise),),
        "quantise_static": (
            Impl(
                op="quantise_static",
                name="torch",
                entry=_QUANTISED + "quantise_static",
                why="some launches of plain torch: no kernel takes one scale for all tokens",
                rejects=_accepts,
                workspace_bytes=quantise_bytes,
                can_capture=True,
            ),
        ),
        "rope_write": (
            _elementwise(
                "rope_write", "splits, norms, rotates and writes the cache in one launch", rejects_rope_write
            ),
        ),
        "act_mul": (_elementwise("act_mul", "one launch, 8 bits on the way out", rejects_act_mul),),
        "embed": (_elementwise("embed", "gathers and scales in one launch", _accepts),),
        "embed_int8": (
            Impl(
                op="embed_int8",
                name="cuda_embed_int8",
                entry="sailfish.kernels.cuda.embedding:embed_int8",
                why="gathers, widens and scales in one launch",
                rejects=_only_cuda,
                workspace_bytes=none_bytes,
                can_capture=True,
            ),
        ),
        "softcap": (_elementwise("softcap", "one pass", _accepts),),
        "linear": (
            _streamed("linear", "linear_bf16", rejects_stream_bf16),
            *CPU["linear"],
            Impl(
                op="linear",
                name="torch",
                entry=_ELEMENTWISE + "linear",
                why="torch's product: cuBLAS, or oneDNN on a CPU",
                rejects=_accepts,
                workspace_bytes=none_bytes,
                can_capture=True,
            ),
        ),
        "linear_int4": (
            _streamed("linear_int4", "linear_int4", rejects_stream_int4),
            Impl(
                op="linear_int4",
                name="cuda_wide_int4",
                entry="sailfish.kernels.cuda.wide:linear_int4",
                why="weights widened in registers on their way into the tensor cores",
                rejects=lambda case: _only_cuda(case) or rejects_wide_int4(case),
                workspace_bytes=wide_int4_bytes,
                can_capture=True,
            ),
            *CPU["linear_int4"],
            _widening("linear_int4", "linear_int4"),
        ),
        "linear_int8": (
            _streamed("linear_int8", "linear_8", rejects_stream_8),
            Impl(
                op="linear_int8",
                name="cuda_wide_int8",
                entry=_LINEAR8 + "wide_linear",
                why="Hopper's tensor cores on int8, scaled on the way out",
                rejects=rejects_wide,
                workspace_bytes=none_bytes,
                can_capture=True,
            ),
            Impl(
                op="linear_int8",
                name="cuda_int_mm",
                entry=_LINEAR8 + "int_mm_linear",
                why="torch's integer product and one kernel that scales",
                rejects=lambda case: _only_cuda(case) or rejects_int_mm(case),
                workspace_bytes=int_mm_bytes,
                can_capture=True,
            ),
            *CPU["linear_int8"],
            _widening("linear_int8", "linear_8"),
        ),
        "linear_fp8": (
            _streamed("linear_fp8", "linear_8", rejects_stream_8),
            Impl(
                op="linear_fp8",
                name="cuda_wide_fp8",
                entry=_LINEAR8 + "wide_linear",
                why="Hopper's tensor cores on float8, scaled on the way out",
                rejects=rejects_wide,
                workspace_bytes=none_bytes,
                can_capture=True,
            ),
            Impl(
                op="linear_fp8",
                name="cuda_scaled_mm",
                entry=_LINEAR8 + "scaled_mm_linear",
                why="torch's product of float8 with scales of rows",
                rejects=lambda case: _only_cuda(case) or rejects_scaled_mm(case),
                workspace_bytes=none_bytes,
                can_capture=True,
            ),
            Impl(
                op="linear_fp8",
                name="cuda_dequantised",
                entry=_LINEAR8 + "dequantised_linear",
                is_fallback=True,
                why="the weight widened for each product, for cards without units for float8",
                rejects=_only_cuda,
                workspace_bytes=dequantised_bytes,
                can_capture=True,
            ),
            _widening("linear_fp8", "linear_8"),
        ),
        "attention": (
            Impl(
                op="attention",
                name="cpu_sdpa",
                entry=_ATTENTION + "cpu_sdpa",
                why="torch's fused attention over gathered pages, groups sized for the CPU's caches",
                rejects=lambda case: _only_cpu(case) or _no_softcap(case),
                workspace_bytes=sdpa_bytes,
            ),
            Impl(
                op="attention",
                name="cuda_paged",
                entry="sailfish.kernels.cuda.attention:attention",
                why="reads pages in place: decodes split over the whole card, prompts on the tensor cores",
                rejects=lambda case: _only_cuda(case) or rejects_paged(case),
                workspace_bytes=paged_bytes,
                can_capture=True,
            ),
            Impl(
                op="attention",
                name="cuda_sdpa",
                entry=_ATTENTION + "cuda_sdpa",
                why="torch's fused attention over gathered pages, decodes batched",
                rejects=lambda case: _only_cuda(case) or _no_softcap(case),
                workspace_bytes=sdpa_bytes,
            ),
            Impl(
                op="attention",
                name="cpu_math",
                entry=_ATTENTION + "cpu_math",
                is_fallback=True,
                why="explicit maths in blocks of bounded memory, any soft-cap",
                rejects=_only_cpu,
                workspace_bytes=math_bytes,
            ),
            Impl(
                op="attention",
                name="cuda_math",
                entry=_ATTENTION + "cuda_math",
                is_fallback=True,
                why="explicit maths in blocks of bounded memory, any soft-cap",
                rejects=_only_cuda,
                workspace_bytes=math_bytes,
            ),
        ),
        "moe": (
            Impl(
                op="moe",
                name="sorted_moe",
                entry="sailfish.kernels.plain.moe:sorted_moe",
                why="runs each expert once, on its own tokens only",
                rejects=_accepts,
                workspace_bytes=moe_bytes,
            ),
        ),
        **FUSED,
    }
)
"""Implementations tried in this order; the reference stands after the last and takes every case."""


def implementations(op: str) -> tuple[Impl, ...]:
    """Return all implementations of an op in order of preference, the reference last."""
    reference = Impl(
        op=op,
        name="reference",
        entry=OPS[op].reference,
        why="the reference, which takes every case",
        rejects=_accepts,
        workspace_bytes=quantise_bytes if op == "quantise" else none_bytes,
        can_capture=op not in ("attention", "moe"),  # whose references read lengths and experts on the host
    )
    return (*PREFERRED.get(op, ()), reference)
