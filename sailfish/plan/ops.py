"""Chooses an implementation for every op of a model on a target, and knows the workspace it takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sailfish.checkpoint.model_config import ModelConfig
from sailfish.kernels import fused_table
from sailfish.kernels.choose import choose, choose_by_rows, known_target, workspace_bytes
from sailfish.kernels.contract import Case, Choice, StepBounds
from sailfish.kernels.fused_table import FUSED
from sailfish.kernels.plain.limits import (
    CPU_ATTENTION_BYTES,
    CUDA_ATTENTION_BYTES,
    INDEX_BYTES,
    MEMO_FRACTION,
)
from sailfish.kernels.table import OPS
from sailfish.plan.formats import format_of, int4_sizes, kind_of
from sailfish.plan.settings import Settings
from sailfish.plan.types import CacheDtype, Dtype, Plan, WeightFormat, WeightFormats

_LINEARS = ("linear", "linear_int4", "linear_int8", "linear_fp8")
_8_BITS = ("int8", "fp8")
LINEAR_OPS = (*_LINEARS, *(f"norm_{linear}" for linear in _LINEARS), "quantise", "quantise_static")
"""Products with weights, and what 8-bit ones need done to activations before."""


def choose_ops(model: ModelConfig, plan: Plan) -> tuple[Choice, ...]:
    """Return the implementation of each op for the plan's target, with the reasons of those before it."""
    cases = op_cases(
        model,
        target=plan.target,
        dtype=plan.dtype,
        kv_dtype=plan.kv_dtype,
        page_tokens=plan.page_tokens,
        formats=plan.formats,
    )
    return choose_all(cases)


def choose_all(cases: Iterable[Case]) -> tuple[Choice, ...]:
    """Return the choice for each case; a linear's by rows."""
    return tuple(
        choice for case in cases for choice in (choose_by_rows(case) if case.n_out else (choose(case),))
    )


def workspaces(model: ModelConfig, target: str, settings: Settings) -> dict[str, int]:
    """Return the most bytes that each op takes beyond its inputs and outputs, by op."""
    bounds = StepBounds(
        step_tokens=settings.step_tokens,
        max_sequences=settings.max_sequences,
        context_tokens=settings.context_tokens,
    )
    taken = dict.fromkeys(OPS, 0)
    for case in op_cases(
        model,
        target=target,
        dtype=settings.dtype,
        kv_dtype=settings.kv_dtype,
        page_tokens=settings.page_tokens,
        formats=settings.formats,
    ):
        for choice in choose_all([case]):
            n_bytes = workspace_bytes(replace(case, max_rows=choice.max_rows), choice, bounds)
            taken[case.op] = max(taken[case.op], n_bytes)
    taken["linear_int4"] += gathered_bytes(model, settings.formats, settings.dtype, settings.step_tokens)
    return taken


def gathered_bytes(model: ModelConfig, formats: WeightFormats, dtype: Dtype, n_tokens: int) -> int:
    """Return the most bytes that the inputs of a product take once more where their order changes."""
    inputs = {"o": model.n_heads * model.head_dim, "down": model.d_mlp}
    widest = max((inputs.get(kind_of(name), model.d_model) for name in formats.ordered), default=0)
    return n_tokens * widest * (4 if dtype == "float32" else 2)


def kept_index_bytes(target: str, settings: Settings) -> int:
    """Return the most bytes of slots and masks that attention keeps from its first layer to its last."""
    limit = CPU_ATTENTION_BYTES if target == "cpu" else CUDA_ATTENTION_BYTES
    n_tokens = min(settings.max_sequences, settings.step_tokens) * settings.context_tokens
    return min(n_tokens * INDEX_BYTES, int(limit * MEMO_FRACTION))


def op_cases(
    model: ModelConfig,
    *,
    target: str,
    dtype: str,
    kv_dtype: CacheDtype,
    page_tokens: int,
    formats: WeightFormats,
) -> tuple[Case, ...]:
    """Return what the model asks of the ops it has: one case an op, and one a shape of linear."""
    moe = next((layer.moe for layer in model.layers if layer.moe is not None), None)
    windows = {layer.window_tokens for layer in model.layers if layer.window_tokens is not None}
    common = Case(
        op="",
        target=known_target(target),
        dtype=dtype,
        kv_dtype=kv_dtype,
        head_dim=model.head_dim,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads,
        page_tokens=page_tokens,
        windows=tuple(sorted(windows)),
        softcap=model.attention_softcap,
        d_model=model.d_model,
        d_mlp=model.d_mlp if moe is None else moe.d_mlp,
        n_experts=0 if moe is None else moe.n_experts,
        n_active=0 if moe is None else moe.n_active,
    )
    linears = linear_shapes(model, formats)
    ops = ["embed" if formats.embedding == "plain" else "embed_int8"]
    ops += ["rms_norm", "add_rms_norm", "rope_write", "attention"]
    ops += ["act_mul"] if any(layer.moe is None for layer in model.layers) else []
    ops += ["moe"] if moe is not None else []
    ops += ["softcap"] if model.logit_softcap is not None else []
    ops += ["quantise"] if any(format in _8_BITS for format, _, _ in linears) else []
    ops += ["quantise_static"] if formats.static else []

    def linear(format: WeightFormat, n_out: int, n_in: int) -> Case:
        return replace(
            common,
            op="linear" if format == "plain" else f"linear_{format}",
            n_out=n_out,
            n_in=n_in,
            group=int4_sizes(n_out, n_in, formats.group)[2] if format == "int4" else 0,
            layout=formats.layout,
        )

    fused = (
        (linear(format, n_out, n_in), activation)
        for format, n_out, n_in, activation in norm_linear_shapes(model, formats)
    )
    return (
        *(replace(common, op=op) for op in ops),
        *(linear(*shape) for shape in linears),
        *(replace(case, op=f"norm_{case.op}", activation=activation) for case, activation in fused),
    )


def linear_shapes(model: ModelConfig, formats: WeightFormats) -> list[tuple[WeightFormat, int, int]]:
    """Return (format, outputs, inputs) of every linear of the model, each once."""
    d, width = model.d_model, model.n_heads * model.head_dim
    found = {
        (formats.layers, _qkv_width(model), d): None,
        (formats.layers, d, width): None,
    }
    for layer in model.layers:
        if layer.moe is None:
            found[formats.layers, 2 * model.d_mlp, d] = None
            found[formats.layers, d, model.d_mlp] = None
        else:
            found["plain", layer.moe.n_experts, d] = None
    widths = {"qkv": _qkv_width(model), "gate_up": 2 * model.d_mlp}
    inputs = {"o": width, "down": model.d_mlp}
    for kind, format in {(kind_of(name), format): None for name, format in formats.others}:
        found[format, widths.get(kind, d), inputs.get(kind, d)] = None
    found[formats.head, model.vocab_size, d] = None
    return list(found)


def launches_saved(model: ModelConfig, formats: WeightFormats, choices: Iterable[Choice], n_rows: int) -> int:
    """Return how many launches fewer a step of so many rows takes for its fused products."""
    choices = [choice for choice in choices if choice.op in FUSED]
    n_saved = 0
    for i, layer in enumerate(model.layers):
        # The first layer has no sum to norm.
        for kind, is_there in (("qkv", i > 0), ("gate_up", layer.moe is None)):
            if not is_there:
                continue
            if f"layers.{i}.{kind}.weight" in (*formats.ordered, *formats.static):
                continue  # inputs are gathered or rounded between the norm and the product
            format = format_of(f"layers.{i}.{kind}.weight", formats)
            op = "norm_linear" if format == "plain" else f"norm_linear_{format}"
            activation = model.activation if kind == "gate_up" else ""
            n_out = 2 * model.d_mlp if activation else _qkv_width(model)
            is_quantised = bool(activation) and format_of(f"layers.{i}.down.weight", formats) in _8_BITS
            n_saved += next(
                fused_table.launches_saved(choice, is_quantised=is_quantised)
                for choice in choices
                if (choice.op, choice.n_out, choice.activation) == (op, n_out, activation)
                and (choice.max_rows is None or n_rows <= choice.max_rows)
            )
    return n_saved


def norm_linear_shapes(
    model: ModelConfig, formats: WeightFormats
) -> list[tuple[WeightFormat, int, int, str]]:
    """Return (format, outputs, inputs, activation or "") of every linear behind a norm, each once."""
    d = model.d_model
    qkv = (_qkv_width(model), d, "")
    gate_up = (2 * model.d_mlp, d, model.activation)
    found = {(formats.layers, *qkv): None}
    if any(layer.moe is None for layer in model.layers):
        found[formats.layers, *gate_up] = None
    for kind, format in {(kind_of(name), format): None for name, format in formats.others}:
        if kind in ("qkv", "gate_up"):
            found[format, *(qkv if kind == "qkv" else gate_up)] = None
    return list(found)


def _qkv_width(model: ModelConfig) -> int:
    return (model.n_heads + 2 * model.n_kv_heads) * model.head_dim
