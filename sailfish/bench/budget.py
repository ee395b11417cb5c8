"""What each op of a decode step should take, from bytes and operations alone: the budget of a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sailfish.bench import peers
from sailfish.bench.shapes import SHAPES

Weights = Literal["bfloat16", "fp8", "int8", "int4"]

_WEIGHT_BYTES = {"bfloat16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5 + 2 / 128}
"""Of one weight, the scale of a group of 128 included."""
_KERNEL_ROW = {"bfloat16": "bf16", "fp8": "w8a8 fp8", "int8": "w8a8 int8", "int4": "w4a16"}
"""How the kernel measurements name a linear of each format."""
CASES: tuple[tuple[str, Weights], ...] = (
    ("llama-3.1-8b", "bfloat16"),
    ("llama-3.1-8b", "int4"),
    ("llama-3.1-8b", "fp8"),
    ("llama-2-7b", "int4"),
)
BATCHES = (1, 16, 64, 256)
CONTEXT_TOKENS = 256
"""Halfway through 256 tokens after a prompt of 128."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the machine reaches."""

    read_gb_per_s: float = 4300.0
    bf16_tflop_per_s: float = 690.0
    floor_us: float = 1.5
    """What a kernel costs beyond its bytes in a chain of kernels that begin before the last one has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One kernel of a step."""

    name: str
    n_calls: int
    """How often it runs in a step."""
    n_bytes: float
    """Of one call."""
    n_flops: float
    is_8bit: bool = False
    row: str = ""
    """Name of the kernel measurement of this very call, if there is one."""

    def limit_us(self, rates: Rates) -> float:
        """Return what one call takes at the least."""
        rate = rates.bf16_tflop_per_s * (2 if self.is_8bit else 1)
        return max(self.n_bytes / rates.read_gb_per_s / 1e3, self.n_flops / rate / 1e6)

    def predicted_us(self, rates: Rates) -> float:
        """Return what one call is expected to take."""
        return rates.floor_us + self.limit_us(rates)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The ops of one decode step, and the time that the target leaves them."""

    shape: str
    weights: Weights
    batch: int
    ops: tuple[Op, ...]
    target_us: float | None
    """A step at the target's rate; None without a target."""
    peer_us: float | None
    """A step at the best peer's rate."""

    def __str__(self) -> str:
        return f"{self.shape} {self.weights}: decode B={self.batch}"

    def step_us(self, rates: Rates) -> float:
        """Return what a step is expected to take."""
        return sum(op.n_calls * op.predicted_us(rates) for op in self.ops)

    def limit_us(self, rates: Rates) -> float:
        """Return what a step takes at the least."""
        return sum(op.n_calls * op.limit_us(rates) for op in self.ops)

    def measured_us(self, measured: Mapping[str, float]) -> float | None:
        """Return the sum of the measured calls, or None unless every op that repeats was measured."""
        if any(op.n_calls > 1 and op.row not in measured for op in self.ops):
            return None
        return sum(op.n_calls * measured.get(op.row, 0.0) for op in self.ops)


def budget(shape: str, weights: Weights, batch: int, context_tokens: int = CONTEXT_TOKENS) -> Budget:
    """Return the budget of one decode step: `batch` sequences of `context_tokens` each, a 16-bit head."""
    known = peers.peer(f"{shape} {weights}: decode B={batch}")
    best = None if known is None else known.best()
    return Budget(
        shape=shape,
        weights=weights,
        batch=batch,
        ops=tuple(_ops(SHAPES[shape], shape, weights, batch, context_tokens)),
        target_us=None if known is None or known.target is None else 1e6 * batch / known.target,
        peer_us=None if best is None else 1e6 * batch / best[1],
    )


def _ops(
    config: Mapping[str, Any], shape: str, weights: Weights, batch: int, context_tokens: int
) -> Sequence[Op]:
    n_layers, d_model, d_mlp = (config[k] for k in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    n_heads, n_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, vocabulary = d_model // n_heads, config["vocab_size"]
    qkv = (n_heads + 2 * n_kv_heads) * head_dim
    is_8bit = weights in ("fp8", "int8")
    in_bytes = 1 if is_8bit else 2
    suffix = f" {weights}" if is_8bit else ""
    is_measured = shape == "llama-3.1-8b"

    def linear(name: str, n_out: int, n_in: int, kind: Weights, n_calls: int = n_layers) -> Op:
        x_bytes = 1 if kind in ("fp8", "int8") else 2
        return Op(
            name=name,
            n_calls=n_calls,
            n_bytes=n_out * n_in * _WEIGHT_BYTES[kind] + batch * (n_in * x_bytes + 2 * n_out),
            n_flops=2.0 * batch * n_out * n_in,
            is_8bit=kind in ("fp8", "int8"),
            row=f"{_KERNEL_ROW[kind]} {name} M={batch}" if is_measured else "",
        )

    def between(name: str, n_bytes: float, row: str, n_calls: int = n_layers) -> Op:
        return Op(name=name, n_calls=n_calls, n_bytes=n_bytes, n_flops=0.0, row=row if is_measured else "")

    row_bytes = 2 * batch * d_model
    norm = f"add_rms_norm{suffix} T={batch}"
    kv_bytes = 2 * 2 * n_kv_heads * head_dim
    attention = Op(
        name="attention",
        n_calls=n_layers,
        n_bytes=batch * (context_tokens * kv_bytes + 4 * n_heads * head_dim),
        n_flops=4.0 * batch * context_tokens * n_heads * head_dim,
        row=f"decode attention {batch} x {context_tokens} bfloat16" if is_measured else "",
    )
    return (
        between("embed", 2 * row_bytes, f"embed T={batch}", 1),
        between("norm before attention", 3.0 * row_bytes + in_bytes * batch * d_model, norm),
        linear("qkv", qkv, d_model, weights),
        between("rope_write", batch * (2 * qkv + 2 * n_heads * head_dim + kv_bytes), f"rope_write T={batch}"),
        attention,
        linear("o", d_model, n_heads * head_dim, weights),
        between("norm before mlp", 3.0 * row_bytes + in_bytes * batch * d_model, norm),
        linear("gate_up", 2 * d_mlp, d_model, weights),
        between("act_mul", batch * d_mlp * (4 + in_bytes), f"act_mul{suffix} T={batch}"),
        linear("down", d_model, d_mlp, weights),
        between("last norm", 4.0 * row_bytes, f"add_rms_norm T={batch}", 1),
        linear("head", vocabulary, d_model, "bfloat16", 1),
        between("sample", 2.0 * batch * vocabulary, f"sample greedy B={batch}", 1),
        between("inputs of the step", 64.0 * batch, f"step inputs B={batch}", 1),
    )
