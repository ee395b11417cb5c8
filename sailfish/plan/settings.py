"""Answers each setting that is no byte count: what was asked for, or the default with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from sailfish.base.config import EngineConfig
from sailfish.base.errors import ConfigError
from sailfish.base.units import format_bytes, format_count
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.hardware.profile import GIB, HardwareProfile
from sailfish.plan.formats import PLAIN, decisions, formats_of, laid_out
from sailfish.plan.types import CacheDtype, Decision, Dtype, WeightFormats

_SMALL_WEIGHTS_BYTES = 2 * GIB
"""Up to here float32 on the CPU costs little and keeps answers exact."""
_BF16_FEATURES = ("avx512_bf16", "amx_bf16", "bf16")
CPU_CONTEXT_TOKENS = 8192
MIN_CONTEXT_TOKENS = 2048
"""An automatic context is never shortened below this to make it fit."""
_PAGE_TOKENS = (8, 16, 32, 64, 128, 256)
_MAX_SEQUENCES = 4096
_MAX_STEP_TOKENS = 1 << 18
_MAX_QUEUE = 1 << 20
_MIXED_S = 0.027
"""What prompts may add to the time between two tokens of an answer, where the device is known."""
_MIXED_TOKENS = 512
"""The same in tokens, where it is not."""
_MIXED_UNIT = 128
_LEAST_MIXED_TOKENS = 256
"""With fewer, each step of a slow device would read the weights for little."""
_REACHED = {"plain": 0.65, "int4": 0.65, "int8": 1.0, "fp8": 1.0}
"""What products of many tokens reach of the data sheet's bfloat16 rate on an H200, by the weights' format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting, decided."""

    dtype: Dtype
    formats: WeightFormats
    kv_dtype: CacheDtype
    context_tokens: int
    max_sequences: int
    step_tokens: int
    mixed_tokens: int
    page_tokens: int
    max_queue: int
    lag: Literal[0, 1]

    @property
    def blocks_per_sequence(self) -> int:
        """Blocks a sequence of full context needs."""
        return -(-self.context_tokens // self.page_tokens)


@dataclass(slots=True)
class Answers:
    """The decisions taken so far, in order."""

    decisions: list[Decision] = field(default_factory=list)

    def settle(self, name: str, asked: Any, default: Any, why: str) -> Any:
        """Record and return what was asked for, or the default with its reason."""
        if asked is not None:
            self.decisions.append(
                Decision(name=name, requested=str(asked), active=str(asked), why="as asked")
            )
            return asked
        self.decisions.append(Decision(name=name, requested="auto", active=str(default), why=why))
        return default

    def downgrade(self, name: str, active: Any, why: str) -> None:
        """Replace the answer of a decision by a lesser one that the device forces."""
        self.decisions = [
            replace(decision, active=str(active), why=why, is_downgrade=True)
            if decision.name == name
            else decision
            for decision in self.decisions
        ]


def settle(
    config: EngineConfig,
    model: ModelConfig,
    hardware: HardwareProfile,
    weights_bytes: dict[Dtype, int],
    answers: Answers,
) -> Settings:
    """Decide every setting; raises ConfigError for one that is out of range."""
    _check(config, model, hardware)
    is_cpu = hardware.device == "cpu"
    answers.settle("device", config.device, hardware.device, hardware.name)
    default_dtype, dtype_why = _default_dtype(config, model, hardware, weights_bytes)
    dtype = answers.settle("dtype", config.dtype, default_dtype, dtype_why)
    if config.dtype is None and config.weights not in PLAIN and dtype == "bfloat16" != model.dtype:
        answers.downgrade("dtype", dtype, dtype_why)
    formats = laid_out(formats_of(config, model), hardware.target)
    answers.decisions += decisions(config, model, formats, cast(Dtype, dtype))
    kv_dtype = answers.settle("kv_dtype", config.kv_dtype, dtype, "as the activations: exact")
    context_tokens = answers.settle("context_tokens", config.context_tokens, *_default_context(model, is_cpu))
    max_sequences = answers.settle(
        "max_sequences",
        config.max_sequences,
        32 if is_cpu else 256,
        "a few cores gain nothing from larger batches" if is_cpu else "decode reads the weights once for all",
    )
    step_tokens = answers.settle(
        "step_tokens",
        config.step_tokens,
        min(max(512 if is_cpu else 8192, max_sequences), max_sequences * context_tokens),
        "keeps a step short for the sequences that decode"
        if is_cpu
        else "fills the device with prefill chunks",
    )
    mixed_tokens = answers.settle(
        "mixed_tokens",
        config.mixed_tokens,
        *_default_mixed(model, hardware, cast(Dtype, dtype), formats, step_tokens),
    )
    if mixed_tokens > step_tokens:
        mixed_tokens = step_tokens
        answers.downgrade("mixed_tokens", mixed_tokens, "no step takes more than step_tokens")
    page_tokens = answers.settle(
        "page_tokens",
        config.page_tokens,
        16,
        "small blocks share more of a prefix",
    )
    max_queue = answers.settle(
        "max_queue", config.max_queue, max(256, 4 * max_sequences), "some batches' worth of waiting requests"
    )
    lag = answers.settle(
        "lag",
        config.lag,
        0 if is_cpu else 1,
        "the CPU has no launch time to hide" if is_cpu else "the host plans while the device computes",
    )
    on = "on" if config.prefix_cache else "off"
    answers.decisions.append(Decision(name="prefix_cache", requested=on, active=on, why="as asked"))
    return Settings(
        dtype=cast(Dtype, dtype),
        formats=formats,
        kv_dtype=cast(CacheDtype, kv_dtype),
        context_tokens=context_tokens,
        max_sequences=max_sequences,
        step_tokens=step_tokens,
        mixed_tokens=mixed_tokens,
        page_tokens=page_tokens,
        max_queue=max_queue,
        lag=lag,
    )


def _default_context(model: ModelConfig, is_cpu: bool) -> tuple[int, str]:
    if is_cpu and model.context_tokens > CPU_CONTEXT_TOKENS:
        allowed = format_count(model.context_tokens)
        return CPU_CONTEXT_TOKENS, f"longer prompts take a CPU minutes; ask for up to {allowed} with --ctx"
    return model.context_tokens, "all that the checkpoint allows"


def _default_mixed(
    model: ModelConfig, hardware: HardwareProfile, dtype: Dtype, formats: WeightFormats, step_tokens: int
) -> tuple[int, str]:
    if hardware.device == "cpu":
        return step_tokens, "as step_tokens, which is small"
    if hardware.bf16_flops_per_s is None or dtype == "float32":
        return min(_MIXED_TOKENS, step_tokens), "answers wait for it; the device's rate is unknown"
    rate = _REACHED[formats.layers] * hardware.bf16_flops_per_s
    tokens = int(_MIXED_S * rate / _flops_per_token(model)) // _MIXED_UNIT * _MIXED_UNIT
    tokens = min(max(tokens, _LEAST_MIXED_TOKENS), step_tokens)
    return tokens, f"answers wait for it: about {tokens * _flops_per_token(model) / rate * 1e3:.0f} ms"


def _flops_per_token(model: ModelConfig) -> int:
    """Return the operations of the layers' products for one token."""
    heads = model.head_dim * (2 * model.n_heads + 2 * model.n_kv_heads)
    widths = (
        heads + 3 * (model.d_mlp if layer.moe is None else layer.moe.n_active * layer.moe.d_mlp)
        for layer in model.layers
    )
    return 2 * model.d_model * sum(widths)


def _default_dtype(
    config: EngineConfig, model: ModelConfig, hardware: HardwareProfile, weights_bytes: dict[Dtype, int]
) -> tuple[Dtype, str]:
    for dtype in PLAIN:
        if dtype == config.weights:
            return dtype, "as the weights were asked for"
    stored = f"the checkpoint stores {model.dtype}"
    if hardware.device == "cuda":
        if model.dtype == "float32":
            return "bfloat16", f"{stored}; bfloat16 halves the bytes each token reads"
        if model.dtype == "float16":
            return "bfloat16", f"{stored}; bfloat16 is as small and does not overflow"
        return "bfloat16", f"as {stored}"
    size = weights_bytes["float32"]
    if size <= _SMALL_WEIGHTS_BYTES:
        return "float32", f"{format_bytes(size)} of weights are small, and float32 is exact"
    fast = [feature for feature in _BF16_FEATURES if feature in hardware.features]
    if fast:
        return (
            "bfloat16",
            f"the CPU has {fast[0]}, and {format_bytes(size)} in float32 would read twice the bytes",
        )
    if size <= hardware.free_bytes // 2:
        return "float32", "the CPU has no bfloat16 instructions"
    return "bfloat16", f"{format_bytes(size)} in float32 exceed half of the free memory"


def _check(config: EngineConfig, model: ModelConfig, hardware: HardwareProfile) -> None:
    if config.device is not None and config.device != hardware.device:
        raise ConfigError(
            f"device {config.device!r} was asked for, but the target is {hardware.target!r}",
            hint="leave device to auto, or choose a target of that device",
            param="device",
        )
    if config.dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(
            f"dtype {config.dtype!r} is not supported", hint='use "float32" or "bfloat16"', param="dtype"
        )
    if config.kv_dtype not in (None, "int8", "fp8", config.dtype):
        raise ConfigError(
            f"kv_dtype {config.kv_dtype!r} is not supported",
            hint='use "int8" or "fp8", or leave it to auto: it is then as dtype',
            param="kv_dtype",
        )
    if config.weights in PLAIN and config.dtype not in (None, config.weights):
        raise ConfigError(
            f"weights {config.weights!r} cannot be multiplied with activations in {config.dtype}",
            hint="ask for one of the two settings only",
            param="weights",
        )
    if config.page_tokens is not None and config.page_tokens not in _PAGE_TOKENS:
        raise ConfigError(
            f"page_tokens {config.page_tokens} is not supported",
            hint=f"use one of {', '.join(map(str, _PAGE_TOKENS))}",
            param="page_tokens",
        )
    _in_range("context_tokens", config.context_tokens, 2, model.context_tokens, "the checkpoint's own limit")
    _in_range("max_sequences", config.max_sequences, 1, _MAX_SEQUENCES, "rows of the device table")
    _in_range("step_tokens", config.step_tokens, 1, _MAX_STEP_TOKENS, "tokens of one step")
    _in_range("mixed_tokens", config.mixed_tokens, 1, _MAX_STEP_TOKENS, "tokens of one step")
    _in_range("max_queue", config.max_queue, 1, _MAX_QUEUE, "requests that wait")
    _in_range("lag", config.lag, 0, 1, "steps planned ahead")
    _in_range("memory_bytes", config.memory_bytes, 1, 1 << 50, "bytes")
    _in_range("kv_bytes", config.kv_bytes, 1, 1 << 50, "bytes")


def _in_range(name: str, value: int | None, low: int, high: int, what: str) -> None:
    if value is None or low <= value <= high:
        return
    raise ConfigError(
        f"{name} is {value}, outside {low} to {high} ({what})", hint=f"choose {name} inside", param=name
    )
