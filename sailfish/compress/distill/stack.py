"""A model that windows are read with together and through which gradients flow.

It is the engine's own decoder over the references of its ops, a block at a time, so that a block can be
sharded or forgotten and run again; every step brings a cache of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sailfish.checkpoint.model_config import ModelConfig
from sailfish.checkpoint.names import TensorSpec, tensor_specs
from sailfish.compress.block import block_specs
from sailfish.kernels.choose import bind
from sailfish.kernels.contract import ActivationFormat, AttentionSpan, Choice, KvLayer, Ops, Quantised
from sailfish.kernels.reference import elementwise
from sailfish.kernels.reference.attention import attention
from sailfish.kernels.table import OPS
from sailfish.models.decoder import Decoder, KvCache, StepInputs

_EMBED, _NORM, _HEAD = "embed.weight", "final_norm.weight", "head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What makes logits of normed states; its weight needs no gradient of its own."""

    weight_VD: Tensor
    softcap: float | None

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Return logits_SV float32."""
        logits_SV = elementwise.linear(hidden_SD, self.weight_VD, None).float()
        return logits_SV if self.softcap is None else elementwise.softcap(logits_SV, self.softcap)


class Stack(nn.Module):
    """A dense model's blocks between its embedding and its final norm; the weights are the checkpoint's."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], *, recompute: bool = False
    ) -> None:
        """Take the checkpoint's tensors by name, of one device. `recompute`: blocks keep no activations."""
        super().__init__()
        self._config = config
        self._recompute = recompute
        self.blocks = nn.ModuleList(_Block(config, i, tensors) for i in range(config.n_layers))
        self._ends = [spec for spec in tensor_specs(config) if not spec.name.startswith("layers.")]
        self.ends = _parameters(self._ends, tensors)

    def forward(self, token_BL: Tensor) -> Tensor:
        """Return hidden_BLD after the final norm of windows that each begin at position 0."""
        ends, step = self._named_ends(), _step(token_BL)
        hidden_TD = elementwise.embed(step.token_T, ends[_EMBED], self._config.embed_scale)
        for block in self.blocks:
            if self._recompute and torch.is_grad_enabled():
                hidden_TD = checkpoint(block, hidden_TD, step, use_reentrant=False)
            else:
                hidden_TD = block(hidden_TD, step)
        normed_TD = elementwise.rms_norm(
            hidden_TD, ends[_NORM], self._config.norm_eps, self._config.norm_plus_one
        )
        assert isinstance(normed_TD, Tensor)
        return normed_TD.view(*token_BL.shape, -1)

    def head(self) -> Head:
        """Return the head with its weight as it now is: a whole one only inside of a sharded forward."""
        ends = self._named_ends()
        return Head(weight_VD=ends.get(_HEAD, ends[_EMBED]), softcap=self._config.logit_softcap)

    def checkpoint_parameters(self) -> dict[str, nn.Parameter]:
        """Return all weights by the checkpoint's names."""
        found = dict(zip(_sources(self._ends), self.ends, strict=True))
        for block in self.blocks:
            assert isinstance(block, _Block)
            found |= zip(_sources(block.specs), block.weights, strict=True)
        return found

    def _named_ends(self) -> dict[str, Tensor]:
        return dict(zip((spec.name for spec in self._ends), self.ends, strict=True))


def engine_weights(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the engine's tensors made of the checkpoint's."""
    return {
        spec.name: _joined(spec, [tensors[source] for source in spec.sources])
        for spec in tensor_specs(config)
    }


class _Block(nn.Module):
    """One block: a decoder of one layer is made of its weights, whole as they are only then, at each call."""

    def __init__(self, config: ModelConfig, layer: int, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.specs = block_specs(config, layer)
        self.weights = _parameters(self.specs, tensors)
        self._config = replace(config, layers=(config.layers[layer],), tied_head=True)
        self._ops = _reference_ops()

    def forward(self, hidden_TD: Tensor, step: StepInputs) -> Tensor:
        """Return what the block adds to the states, with them."""
        config, parts = self._config, iter(self.weights)
        # The states before it are wanted, not after the final norm: it is empty.
        weights = {_EMBED: hidden_TD.new_empty(0), _NORM: hidden_TD.new_empty(0)}
        weights |= {spec.name: _joined(spec, [next(parts) for _ in spec.sources]) for spec in self.specs}
        ops = replace(self._ops, embed=lambda *_: hidden_TD)
        n_windows, length = len(step.span.kv_len), step.span.kv_len[0]
        shape = (n_windows, length, config.n_kv_heads, config.head_dim)
        # Of the dtype that products come in, which is autocast's where it is on.
        dtype = torch.get_autocast_dtype(hidden_TD.device.type) if _is_cast(hidden_TD) else hidden_TD.dtype
        kv = KvLayer(*(torch.empty(shape, dtype=dtype, device=hidden_TD.device) for _ in range(2)))
        decoder = Decoder(config, weights, ops, max_positions=length)
        return decoder.forward(step, KvCache((kv,)))


def _reference_ops() -> Ops:
    choices = [Choice(op=op, implementation="reference", why="", declined=()) for op in OPS]
    return replace(bind(choices), attention=_attention, add_rms_norm=_add_rms_norm)


def _add_rms_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    plus_one: bool,
    out: ActivationFormat = "plain",
) -> tuple[Tensor | Quantised, Tensor]:
    """Meet `contract.AddRmsNorm`; with an empty weight there is no norm."""
    if len(weight_D) == 0:
        sum_TD = x_TD + residual_TD
        return sum_TD, sum_TD
    return elementwise.add_rms_norm(x_TD, residual_TD, weight_D, eps, plus_one, out)


def _attention(
    q_THE: Tensor, kv: KvLayer, span: AttentionSpan, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Meet `contract.Attention` for whole windows, a block of the cache each."""
    n_windows, length = kv.k_NPKE.shape[:2]
    if softcap is not None or (window is not None and window < length):
        return attention(q_THE, kv, span, scale, window, softcap)
    q_BHLE = q_THE.view(n_windows, length, *q_THE.shape[1:]).transpose(1, 2)
    k_BKLE, v_BKLE = kv.k_NPKE.transpose(1, 2), kv.v_NPKE.transpose(1, 2)
    y_BHLE = F.scaled_dot_product_attention(
        q_BHLE, k_BKLE, v_BKLE, is_causal=True, scale=scale, enable_gqa=True
    )
    return y_BHLE.transpose(1, 2).flatten(0, 1)


def _step(token_BL: Tensor) -> StepInputs:
    """Return the windows as sequences of one step, each with one block of the cache."""
    n_windows, length = token_BL.shape
    device = token_BL.device
    row_B = torch.arange(n_windows, dtype=torch.int32, device=device)
    span = AttentionSpan(
        block_table_RW=row_B.unsqueeze(1),
        row_B=row_B,
        query_start=tuple(range(0, n_windows * length + 1, length)),
        kv_len=(length,) * n_windows,
        kv_len_B=torch.full((n_windows,), length, dtype=torch.int32, device=device),
        query_start_B1=torch.arange(n_windows + 1, dtype=torch.int32, device=device) * length,
    )
    return StepInputs(
        token_T=token_BL.flatten(),
        position_T=torch.arange(length, device=device).repeat(n_windows),
        slot_T=torch.arange(n_windows * length, device=device),
        span=span,
    )


def _is_cast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _parameters(specs: Sequence[TensorSpec], tensors: Mapping[str, Tensor]) -> nn.ParameterList:
    return nn.ParameterList(tensors[source] for source in _sources(specs))


def _sources(specs: Sequence[TensorSpec]) -> list[str]:
    return [source for spec in specs for source in spec.sources]


def _joined(spec: TensorSpec, parts: Sequence[Tensor]) -> Tensor:
    """Return a spec's tensor of its sources, as `load_weights` lays it out."""
    rows = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    if spec.run:
        rows = rows.view(2, -1, spec.run, *spec.shape[1:]).transpose(0, 1)
    return rows.reshape(spec.shape)
