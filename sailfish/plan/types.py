"""What a plan is: every "auto" answered with its reason, and every byte accounted for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sailfish.kernels.contract import Int4Layout

Dtype = Literal["float32", "bfloat16"]


CacheDtype = Literal["float32", "bfloat16", "int8", "fp8"]
"""Of the KV cache; in 8 bits each token and head has a float32 scale."""
WeightFormat = Literal["plain", "int4", "int8", "fp8"]
"""Of a linear's weight; "plain" is the plan's dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormats:
    """What the weights of linears and the embedding are stored in."""

    layers: WeightFormat = "plain"
    """Of attention and MLP projections."""
    head: WeightFormat = "plain"
    embedding: WeightFormat = "plain"
    """Of the table that tokens are looked up in."""
    group: int = 128
    """Inputs of a row that share a scale, in 4 bits."""
    layout: Int4Layout = "tensor_core"
    """How the bytes of 4-bit weights lie."""
    stored: bool = False
    """Layers' weights are as the checkpoint has them: in 4 bits their scales are in the plan's dtype."""
    zero_points: bool = False
    """4-bit weights of layers have zero points, in the plan's dtype too."""
    others: tuple[tuple[str, WeightFormat], ...] = ()
    """(name, format) of layers' weights that are in another format than `layers`."""
    ordered: tuple[str, ...] = ()
    """4-bit weights of layers whose inputs are in an order of their own, which products gather first."""
    static: tuple[str, ...] = ()
    """8-bit weights of layers whose inputs have one scale for all tokens, found by calibration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One setting: what was asked, what is active, and why."""

    name: str
    requested: str
    active: str
    why: str
    is_downgrade: bool = False
    """Less than the checkpoint offers, forced by the device: `--strict` refuses it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLine:
    """One part of the device's memory, in bytes."""

    name: Literal["weights", "kv_blocks", "activations", "graphs", "workspaces", "runtime", "margin"]
    bytes: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec:
    """The KV layout of a group of layers that share it."""

    layers: tuple[int, ...]
    kind: Literal["full", "window"]
    window_tokens: int | None
    dtype: CacheDtype
    bytes_per_token: int
    """K and V of all layers of the group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything the engine allocates and obeys. Nothing edits it afterwards."""

    target: str
    """"cpu" or "sm_90" and the like."""
    device: Literal["cpu", "cuda"]
    dtype: Dtype
    """Of activations, and of weights that no format holds."""
    formats: WeightFormats
    kv_dtype: CacheDtype
    page_tokens: int
    context_tokens: int
    max_sequences: int
    """Rows of the device table: sequences that can run at once."""
    step_tokens: int
    """Token budget of one step."""
    mixed_tokens: int
    """The same of a step in which sequences decode, prompts having a quarter of it at least."""
    max_queue: int
    """Requests that may wait before admission refuses."""
    n_blocks: int
    lag: Literal[0, 1]
    """Steps planned before the previous step's tokens are known."""
    prefix_cache: bool
    graph_buckets: tuple[int, ...]
    """Numbers of sequences for which a decode step is captured as a CUDA graph, ascending."""
    graph_chunks: tuple[int, ...]
    """Numbers of tokens for which the forward pass of a step with prompts is."""
    cache: tuple[CacheSpec, ...]
    memory: tuple[MemoryLine, ...]
    decisions: tuple[Decision, ...]

    @property
    def blocks_per_sequence(self) -> int:
        """Blocks a sequence of full context needs."""
        return -(-self.context_tokens // self.page_tokens)

    @property
    def total_bytes(self) -> int:
        """Sum of all memory lines."""
        return sum(line.bytes for line in self.memory)

    def memory_bytes(self, name: str) -> int:
        """Bytes of one memory line."""
        return sum(line.bytes for line in self.memory if line.name == name)
