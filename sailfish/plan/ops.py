"""Chooses an implementation for every op of a model on a target, and knows the workspace it takes."""

from __future__ import annotations

from sailfish.base.errors import ConfigError
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.kernels.choose import choose, workspace_bytes
from sailfish.kernels.contract import TARGETS, Case, Choice, StepBounds
from sailfish.kernels.plain.limits import (
    CPU_ATTENTION_BYTES,
    CUDA_ATTENTION_BYTES,
    INDEX_BYTES,
    MEMO_FRACTION,
)
from sailfish.kernels.table import OPS
from sailfish.plan.settings import Settings
from sailfish.plan.types import Plan


def choose_ops(model: ModelConfig, plan: Plan) -> tuple[Choice, ...]:
    """Return the implementation of each op for the plan's target, with the reasons of those before it."""
    cases = op_cases(model, target=plan.target, dtype=plan.dtype, page_tokens=plan.page_tokens)
    return tuple(map(choose, cases))


def workspaces(model: ModelConfig, target: str, settings: Settings) -> dict[str, int]:
    """Return the most bytes that each op takes beyond its inputs and outputs, by op."""
    bounds = StepBounds(
        step_tokens=settings.step_tokens,
        max_sequences=settings.max_sequences,
        context_tokens=settings.context_tokens,
    )
    cases = op_cases(model, target=target, dtype=settings.dtype, page_tokens=settings.page_tokens)
    unused = set() if any(layer.moe for layer in model.layers) else {"moe"}
    return {
        case.op: 0 if case.op in unused else workspace_bytes(case, choose(case), bounds) for case in cases
    }


def kept_index_bytes(target: str, settings: Settings) -> int:
    """Return the most bytes of slots and masks that attention keeps from its first layer to its last."""
    limit = CPU_ATTENTION_BYTES if target == "cpu" else CUDA_ATTENTION_BYTES
    n_tokens = min(settings.max_sequences, settings.step_tokens) * settings.context_tokens
    return min(n_tokens * INDEX_BYTES, int(limit * MEMO_FRACTION))


def op_cases(model: ModelConfig, *, target: str, dtype: str, page_tokens: int) -> tuple[Case, ...]:
    """Return what the model asks of each op, one case an op."""
    moe = next((layer.moe for layer in model.layers if layer.moe is not None), None)
    windows = {layer.window_tokens for layer in model.layers if layer.window_tokens is not None}
    return tuple(
        Case(
            op=op,
            target=_known(target),
            dtype=dtype,
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
        for op in OPS
    )


def _known(target: str) -> str:
    """Return the target, or for a newer card the newest older one, whose code it runs."""
    if target in TARGETS:
        return target
    older = [known for known in TARGETS if known != "cpu" and _number(known) <= _number(target)]
    if not older:
        raise ConfigError(f"target {target!r} is too old", hint=f"use one of {', '.join(TARGETS)}")
    return max(older, key=_number)


def _number(target: str) -> int:
    digits = target.removeprefix("sm_")
    return int(digits) if digits.isdigit() else 0
