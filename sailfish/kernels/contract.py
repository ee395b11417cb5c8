"""What an op is before it is code: its contract, the case it is asked for, who can do it, and who was chosen.

The legend of letters that shape suffixes use everywhere:

    T tokens in the step      D model width           P tokens per block    L layers
    B sequences in the step   M mlp width             N blocks              X experts
    S sampled rows            V vocabulary            W blocks per table row
    H query heads             K key/value heads       C positions of a table
    E head width              F rotated pairs of a head   O, I rows and columns of a linear weight

Nothing here imports torch, so that a build for a device that is elsewhere can ask the same questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sailfish.kernels.int4 import Int4Weight

Int4Layout = Literal["tensor_core", "lanes"]
"""How the bytes of a 4-bit weight lie: for the tensor cores of a GPU, or for the lanes of a CPU's vectors."""
TARGETS = ("cpu", "sm_80", "sm_86", "sm_89", "sm_90")
"""Devices that implementations are written with in mind; a newer "sm_..." is none of them, yet CUDA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One op as one model on one target needs it. Fields an op does not use keep their default."""

    op: str
    target: str
    """One of TARGETS, or another CUDA architecture."""
    dtype: str
    """"float32" or "bfloat16", of activations and of weights that no format holds; a linear outside of an
    engine may have "float16" ones."""
    head_dim: int = 0
    n_heads: int = 0
    n_kv_heads: int = 0
    page_tokens: int = 0
    windows: tuple[int, ...] = ()
    """Window sizes of the layers that have one, in tokens."""
    softcap: float | None = None
    d_model: int = 0
    d_mlp: int = 0
    n_experts: int = 0
    n_active: int = 0
    """Experts a token is routed to."""
    kv_dtype: str = ""
    """Of the cache: "float32", "bfloat16", "int8" or "fp8"."""
    n_out: int = 0
    """Of a linear: rows of its weight, outputs."""
    n_in: int = 0
    """Of a linear: columns of its weight, inputs."""
    group: int = 0
    """Of a 4-bit linear: inputs that share a scale."""
    layout: Int4Layout = "tensor_core"
    """Of a 4-bit linear."""
    max_rows: int | None = None
    """Of a linear: the most rows of activations it is called with in this case; None: any number."""
    activation: str = ""
    """Of a linear with a norm before it: what comes behind it, "silu" or "gelu_tanh"; "": nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBounds:
    """The largest step an engine will ever run."""

    step_tokens: int
    max_sequences: int
    context_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """The contract that every implementation of an op meets."""

    name: str
    reference: str
    """`module:function` of the law."""
    axes: Mapping[str, str]
    """Letters of each tensor argument and, under "out", of what is returned."""
    mutates: tuple[str, ...] = ()
    """Arguments written in place."""
    tolerance: Mapping[str, float] = field(default_factory=lambda: {"float32": 1e-5, "bfloat16": 2e-2})
    """Largest absolute error against the reference on inputs of unit scale, by dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Impl:
    """One way to compute an op."""

    op: str
    name: str
    entry: str
    """`module:function`, imported only when the choice is bound."""
    adapter: str = ""
    """`module:function` that does the op with the entry as its first argument, where that does a part."""
    why: str
    """Why it is preferred to those after it, in words."""
    is_fallback: bool = False
    """Much slower than the preferred one of the same device; `--strict` refuses it."""
    rejects: Callable[[Case], str | None]
    """The reason it cannot do a case, or None."""
    workspace_bytes: Callable[[Case, StepBounds], int]
    """Temporary device memory beyond inputs and outputs, at most."""
    can_capture: bool = False
    """A CUDA graph of it can be replayed for other lengths and values: it reads none on the host.
    Attention: of single queries; it also takes `out_THE`, where to put the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The implementation that does an op, and the reason each better one was passed over."""

    op: str
    implementation: str
    why: str
    declined: tuple[tuple[str, str], ...]
    is_fallback: bool = False
    """A better implementation exists for this device, and the model rules it out."""
    n_out: int = 0
    """Of a linear: the shape of the weight it is for."""
    n_in: int = 0
    max_rows: int | None = None
    """Of a linear: it does up to so many rows of activations, those beyond the choice before it."""
    activation: str = ""
    """Of a linear with a norm before it: what comes behind it; "": nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpan:
    """Which cached tokens each sequence of a step attends to.

    Sequence b owns queries query_start[b] .. query_start[b + 1] of the step; they are the last ones of
    its kv_len[b] visible tokens. A query sees keys at or before its own position. Sequences without
    queries are allowed.
    """

    block_table_RW: Tensor
    """int32, on the device: the block that holds tokens w * P .. (w + 1) * P of row r.
    Entries past a sequence's tokens are never read."""
    row_B: Tensor
    """int32, on the device: the row of each sequence."""
    query_start: tuple[int, ...]
    """B + 1 offsets into T, on the host."""
    kv_len: tuple[int, ...]
    """B lengths, on the host; in a step that is captured to be replayed, upper bounds of them."""
    kv_len_B: Tensor
    """The lengths as int32 on the device. 0: a row that only pads a captured step; it yields zeros."""
    query_start_B1: Tensor
    """query_start as int32 on the device."""
    n_single: int = 0
    """The first n_single sequences have one query each."""
    memo: dict[object, Any] = field(default_factory=dict)
    """What an implementation derives from the span once and uses again in every layer, under its own key."""

    @property
    def block_table_BW(self) -> Tensor:
        """The rows of the step's sequences, gathered once."""
        table: Tensor | None = self.memo.get("block_table_BW")
        if table is None:
            table = self.memo["block_table_BW"] = self.block_table_RW.index_select(0, self.row_B)
        return table


@dataclass(frozen=True, slots=True)
class KvLayer:
    """The cache of one layer. In 8 bits each token and head has a scale: value = stored * scale."""

    k_NPKE: Tensor
    """float32, bfloat16, int8 or float8_e4m3fn."""
    v_NPKE: Tensor
    k_scale_NPK: Tensor | None = None
    """float32, with 8-bit caches only."""
    v_scale_NPK: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Quantised:
    """Activations in 8 bits, one scale a token: value = stored * scale."""

    values_TI: Tensor
    """int8 or float8_e4m3fn."""
    scale_T: Tensor
    """float32."""
    dtype: torch.dtype
    """What products with it are returned in."""

    def __len__(self) -> int:
        return len(self.values_TI)


ActivationFormat = Literal["plain", "int8", "fp8"]
"""What a producer of activations returns: a tensor of the model's dtype, or Quantised."""


@dataclass(frozen=True, slots=True)
class Weight8:
    """A linear weight in 8 bits, one scale a row: value = stored * scale."""

    values_OI: Tensor
    """int8 or float8_e4m3fn."""
    scale_O: Tensor
    """float32."""
    input_scale_1: Tensor | None = None
    """float32: the scale of all its inputs (static); None: each token has its own."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        n_out, n_in = self.values_OI.shape
        return n_out, n_in

    @property
    def format(self) -> Literal["int8", "fp8"]:
        """What its values are, and what activations it multiplies with are quantised to."""
        return "fp8" if self.values_OI.is_floating_point() else "int8"


@dataclass(frozen=True, slots=True)
class SumNorm:
    """How a product's input is made where the norm before it is its prologue: rms_norm(x + residual)."""

    residual_TD: Tensor
    weight_D: Tensor
    eps: float
    plus_one: bool
    """The norm multiplies by 1 + weight."""


class RmsNorm(Protocol):
    """Return x / rms(x) * weight, or * (1 + weight), over the last axis, computed in float32.

    Source: Zhang and Sennrich 2019.
    """

    def __call__(
        self, x_TD: Tensor, weight_D: Tensor, eps: float, plus_one: bool, out: ActivationFormat = "plain"
    ) -> Tensor | Quantised: ...


class AddRmsNorm(Protocol):
    """Return (rms_norm(x + residual), x + residual)."""

    def __call__(
        self,
        x_TD: Tensor,
        residual_TD: Tensor,
        weight_D: Tensor,
        eps: float,
        plus_one: bool,
        out: ActivationFormat = "plain",
    ) -> tuple[Tensor | Quantised, Tensor]: ...


class Quantise(Protocol):
    """Return x in 8 bits: scale = largest absolute value of the token / 127 (int8) or / 448 (fp8).

    Rounded to nearest, ties to even; a token of zeros has scale 1.
    """

    def __call__(self, x_TI: Tensor, out: ActivationFormat) -> Quantised: ...


class QuantiseStatic(Protocol):
    """Return x in 8 bits with one scale for all tokens; what is beyond the largest number is cut off.

    Rounded to nearest, ties to even, to -128 .. 127 (int8) or -448 .. 448 (fp8).
    """

    def __call__(self, x_TI: Tensor, out: ActivationFormat, scale_1: Tensor) -> Quantised: ...


class LinearOp(Protocol):
    """Return x @ weight.T + bias."""

    def __call__(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor: ...


class LinearInt4(Protocol):
    """Return x @ dequantised(weight).T + bias."""

    def __call__(self, x_TI: Tensor, weight: Int4Weight, bias_O: Tensor | None) -> Tensor: ...


class Linear8(Protocol):
    """Return scale_x * scale_weight * (x @ weight.T) + bias; integers are summed exactly."""

    def __call__(self, x: Quantised, weight: Weight8, bias_O: Tensor | None) -> Tensor: ...


class NormLinear(Protocol):
    """Return (activation of norm(x + residual) @ weight.T + bias, x + residual).

    The sum, its norm, the product and the activation's result are each rounded to x's dtype, or the norm
    and what is returned quantised, as add_rms_norm, the linear of the weight's format and act_mul do; with
    no activation the product is returned. `ops` does what an implementation does not do itself.
    """

    def __call__(
        self,
        ops: Ops,
        x_TD: Tensor,
        norm: SumNorm,
        weight: Tensor | Int4Weight | Weight8,
        bias_O: Tensor | None,
        activation: str | None = None,
        out: ActivationFormat = "plain",
    ) -> tuple[Tensor | Quantised, Tensor]: ...


class RopeWrite(Protocol):
    """Split qkv into heads, norm and rotate q and k, write k and v to their slots, and return q.

    qkv_TX holds H query heads, then K key heads, then K value heads. q_norm_E and k_norm_E are weights
    of RMS norms over each head, or None. The leading 2F elements of each head are rotated by the
    table's angles: table_C2F holds cos and sin by position; pairs are (f, f + F), or (2f, 2f + 1) if
    interleaved. A slot is block * P + offset; slots are distinct, and a negative one is not written. An
    8-bit cache stores value / scale with scale = largest absolute value of the head / 127 (int8) or
    / 448 (fp8). Source of the rotation: Su et al. 2021.
    """

    def __call__(
        self,
        qkv_TX: Tensor,
        n_heads: int,
        q_norm_E: Tensor | None,
        k_norm_E: Tensor | None,
        eps: float,
        plus_one: bool,
        table_C2F: Tensor,
        position_T: Tensor,
        interleaved: bool,
        kv: KvLayer,
        slot_T: Tensor,
    ) -> Tensor: ...


class Attention(Protocol):
    """Return softmax(softcap(scale * q . k)) v over the cached tokens that each query may see.

    A query at position p sees keys p - window + 1 .. p, all up to p without a window. softcap(s) is
    softcap * tanh(s / softcap). Only tokens of the span are read: what lies in other slots, NaN
    included, reaches no output.
    """

    def __call__(
        self,
        q_THE: Tensor,
        kv: KvLayer,
        span: AttentionSpan,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor: ...


def gated_run(d_mlp: int) -> int:
    """Return how many outputs of gate follow each other before as many of up do, in gate_up_T2M.

    In turns of 8, so that who holds output g of a strip of 16 on the tensor cores holds g + 8 too, and
    with it both factors; where the width is no multiple of 8, all of gate and then all of up.
    """
    return 8 if d_mlp % 8 == 0 else d_mlp


class ActMul(Protocol):
    """Return activation(gate) * up, which alternate as `gated_run` says.

    activation is "silu" or "gelu_tanh"; its result is rounded to the inputs' dtype before the product.
    """

    def __call__(
        self, gate_up_T2M: Tensor, activation: str, out: ActivationFormat = "plain"
    ) -> Tensor | Quantised: ...


class Moe(Protocol):
    """Return the routed experts' outputs, weighted and summed.

    Weights are the softmax over all experts in float32, of the n_active largest, rescaled to sum to one
    if normalise. Source: Shazeer et al. 2017, Jiang et al. 2024 (Mixtral).
    """

    def __call__(
        self,
        x_TD: Tensor,
        router_TX: Tensor,
        gate_up_X2MD: Tensor,
        down_XDM: Tensor,
        n_active: int,
        normalise: bool,
        activation: str,
    ) -> Tensor: ...


class Embed(Protocol):
    """Return the rows of weight, times scale rounded to weight's dtype."""

    def __call__(self, token_T: Tensor, weight_VD: Tensor, scale: float) -> Tensor: ...


class EmbedInt8(Protocol):
    """Return the rows of weight, each times its scale and `scale`, rounded to dtype once."""

    def __call__(self, token_T: Tensor, weight: Weight8, scale: float, dtype: torch.dtype) -> Tensor: ...


class Softcap(Protocol):
    """Return cap * tanh(x / cap)."""

    def __call__(self, x_SV: Tensor, cap: float) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """One bound implementation of every op: all that the forward pass may call."""

    rms_norm: RmsNorm
    add_rms_norm: AddRmsNorm
    quantise: Quantise
    quantise_static: QuantiseStatic
    linear: LinearOp
    linear_int4: LinearInt4
    linear_int8: Linear8
    linear_fp8: Linear8
    norm_linear: NormLinear
    norm_linear_int4: NormLinear
    norm_linear_int8: NormLinear
    norm_linear_fp8: NormLinear
    rope_write: RopeWrite
    attention: Attention
    act_mul: ActMul
    moe: Moe
    embed: Embed
    embed_int8: EmbedInt8
    softcap: Softcap
