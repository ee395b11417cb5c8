"""Runs one block of a model at a time, through the engine's own decoder, and shows what its linears read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sailfish.checkpoint.model_config import ModelConfig
from sailfish.checkpoint.names import TensorSpec, tensor_specs
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.kernels.choose import bind
from sailfish.kernels.composed import norm_linear
from sailfish.kernels.contract import ActivationFormat, Ops, Quantised
from sailfish.kernels.reference.elementwise import gated
from sailfish.kernels.reference.moe import route
from sailfish.kernels.reference.quantised import quantise, quantise_static
from sailfish.models.arena import arena_layout
from sailfish.models.decoder import Decoder, KvCache, StepInputs
from sailfish.models.load import ARENA_DTYPES, DTYPES, assemble, load_weights
from sailfish.plan.formats import arena_tensors
from sailfish.plan.ops import choose_all, op_cases
from sailfish.plan.types import Dtype, WeightFormats

_PAGE_TOKENS = 64
_SPELLED = {dtype: name for name, dtype in DTYPES.items()}
_LINEARS = ("qkv", "o", "gate_up", "down")
_EMBED, _NORM = "embed.weight", "final_norm.weight"

See = Callable[[str, Tensor], None]
"""Told the name of a site and inputs [T, I] that its linears read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where blocks run, and in what."""

    target: str
    """"cpu", "sm_90" and the like."""
    dtype: Dtype
    """Of activations."""

    @property
    def torch(self) -> str:
        """The device as torch calls it."""
        return "cpu" if self.target == "cpu" else "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The linears of a block that read the same inputs."""

    name: str
    """"qkv", "o", "gate_up", "down"; of an expert "experts.3.gate_up"."""
    modules: tuple[str, ...]
    """Their names in the checkpoint, in the order of the rows of the engine's one matrix."""
    n_in: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedInputs:
    """What a site makes of its inputs before it multiplies."""

    to: ActivationFormat
    scale_1: Tensor | None = None
    """float32, of all tokens; None: each has its own."""


def block_specs(config: ModelConfig, layer: int) -> list[TensorSpec]:
    """Return a block's tensors under the engine's names of layer 0, sources under the checkpoint's."""
    one = _one(config, layer)
    return [
        replace(spec, sources=tuple(_renamed(source, layer) for source in spec.sources))
        for spec in tensor_specs(one)
        if spec.name.startswith("layers.0.")
    ]


def sites(config: ModelConfig, layer: int) -> list[Site]:
    """Return the block's sites in the order of the forward pass; a router is none."""
    found: list[Site] = []
    for spec in block_specs(config, layer):
        name = spec.name.removeprefix("layers.0.").removesuffix(".weight")
        modules = tuple(source.removesuffix(".weight") for source in spec.sources)
        if name in _LINEARS:
            found.append(Site(name=name, modules=modules, n_in=spec.shape[-1]))
        elif name.startswith("experts."):
            part, n_experts = name.removeprefix("experts."), spec.shape[0]
            each = len(modules) // n_experts
            found += [
                Site(
                    name=f"experts.{x}.{part}",
                    modules=modules[x * each : (x + 1) * each],
                    n_in=spec.shape[-1],
                )
                for x in range(n_experts)
            ]
    return found


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return a copy of one tensor of a dense checkpoint, on the host in its dtype."""
    ref = checkpoint.tensors[name]
    return torch.frombuffer(bytearray(checkpoint.bytes(name)), dtype=DTYPES[ref.dtype]).view(ref.shape)


def embedded(config: ModelConfig, tokens: Sequence[int], table_VD: Tensor, on: Device) -> Tensor:
    """Return tokens' embeddings on the device, rounded as the embedding op rounds them."""
    dtype = ARENA_DTYPES[on.dtype]
    rows_TD = table_VD[torch.tensor(tokens)].to(dtype)
    scale = torch.tensor(config.embed_scale, dtype=dtype)
    return (rows_TD * scale if config.embed_scale != 1 else rows_TD).to(on.torch)


def block_tensors(checkpoint: Checkpoint, config: ModelConfig, layer: int) -> dict[str, Tensor]:
    """Return a block's tensors by the checkpoint's names, on the host."""
    names = [source for spec in block_specs(config, layer) for source in spec.sources]
    return {name: read_tensor(checkpoint, name) for name in names}


def outer_tensors(checkpoint: Checkpoint, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return (table_VD, norm_D, head_VD) of a model, on the host; a tied head is the table."""
    sources = {spec.name: spec.sources[0] for spec in tensor_specs(config)}
    table_VD = read_tensor(checkpoint, sources[_EMBED])
    head_VD = read_tensor(checkpoint, sources["head.weight"]) if "head.weight" in sources else table_VD
    return table_VD, read_tensor(checkpoint, sources[_NORM]), head_VD


class Block:
    """One block with its weights on the device; nothing of it outlives it."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        tensors: Mapping[str, Tensor],
        on: Device,
        window_tokens: int,
        *,
        head: tuple[Tensor, Tensor] | None = None,
        rounded: Mapping[str, RoundedInputs] | None = None,
    ) -> None:
        """Take the block's tensors by the checkpoint's names, of any device and float dtype.

        With a `head`, (norm_D, head_VD), `run` returns normed states and `logits` may be called. `rounded`
        names the sites that round their inputs to 8 bits.
        """
        one = _one(config, layer, 1 if head is None else len(head[1]))
        self._is_last = head is not None
        specs = {spec.name: spec for spec in block_specs(config, layer)}
        memory = {name: [Memory(tensors[source]) for source in spec.sources] for name, spec in specs.items()}
        norm, table = head if head is not None else (torch.zeros(one.d_model), torch.zeros(1, one.d_model))
        memory |= {_NORM: [Memory(norm)], _EMBED: [Memory(table)]}
        arena = arena_tensors(one, WeightFormats())
        _, n_bytes = arena_layout(arena, on.dtype)
        room = torch.empty(n_bytes, dtype=torch.uint8, device=on.torch)
        weights = assemble(one, WeightFormats(), load_weights(arena, memory, room, on.dtype))
        known = {f"layers.0.{name}.weight": name for name in _LINEARS}
        names = {id(weights[name]): known[name] for name in specs if name in known}
        cases = op_cases(
            one,
            target=on.target,
            dtype=on.dtype,
            kv_dtype=on.dtype,
            page_tokens=_PAGE_TOKENS,
            formats=WeightFormats(),
        )
        self._taps = _Taps(bind(choose_all(cases)), names, id(weights[_NORM]), dict(rounded or {}))
        self._decoder = Decoder(one, weights, self._taps.ops(), max_positions=window_tokens)
        n_blocks = -(-window_tokens // _PAGE_TOKENS)
        norm_D = weights[_NORM]
        assert isinstance(norm_D, Tensor)
        self._device = norm_D.device
        cache = torch.zeros(
            (1, 2, n_blocks, _PAGE_TOKENS, one.n_kv_heads, one.head_dim),
            dtype=norm_D.dtype,
            device=self._device,
        )
        self._kv = KvCache.of(cache)
        self._block_1W = torch.arange(n_blocks, dtype=torch.int32, device=self._device).unsqueeze(0)

    @torch.inference_mode()
    def run(self, hidden_TD: Tensor, see: See | None = None) -> Tensor:
        """Return what the block makes of a window's states; after the final norm where it has the head.

        `see` is told what each site reads.
        """
        any_T = torch.arange(len(hidden_TD), device=self._device)  # states come in the tokens' place
        step = StepInputs.of_window(any_T, self._block_1W)
        self._taps.hidden_TD, self._taps.see = hidden_TD, see
        normed_TD = self._decoder.forward(step, self._kv)
        return normed_TD if self._is_last else self._taps.hidden_TD

    @torch.inference_mode()
    def logits(self, normed_SD: Tensor) -> Tensor:
        """Return logits_SV float32 of normed states."""
        return self._decoder.logits(normed_SD).float()


class _Taps:
    """The block's ops: states go in where the embedding is read, and out where the final norm adds."""

    def __init__(
        self,
        ops: Ops,
        names: Mapping[int, str],
        final_norm: int,
        rounded: dict[str, RoundedInputs],
    ) -> None:
        self._ops = ops
        self._names = names
        self._final_norm = final_norm
        self.see: See | None = None
        self._rounded = rounded
        self.hidden_TD = torch.empty(0)

    def ops(self) -> Ops:
        """Return the bound ops with taps on; no product hides its norm."""
        return replace(
            self._ops,
            embed=lambda *_: self.hidden_TD,
            add_rms_norm=self._add_rms_norm,
            linear=self._linear,
            norm_linear=norm_linear,
            moe=self._moe,
        )

    def _add_rms_norm(
        self,
        x_TD: Tensor,
        residual_TD: Tensor,
        weight_D: Tensor,
        eps: float,
        plus_one: bool,
        out: ActivationFormat = "plain",
    ) -> tuple[Tensor | Quantised, Tensor]:
        normed, total_TD = self._ops.add_rms_norm(x_TD, residual_TD, weight_D, eps, plus_one, out)
        if id(weight_D) == self._final_norm:
            self.hidden_TD = total_TD
        return normed, total_TD

    def _linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        name = self._names.get(id(weight_OI))
        return self._ops.linear(x_TI if name is None else self._read(name, x_TI), weight_OI, bias_O)

    def _read(self, name: str, x_TI: Tensor) -> Tensor:
        """Show a site's inputs, and return them as it reads them."""
        if self.see is not None:
            self.see(name, x_TI)
        how = self._rounded.get(name)
        if how is None:
            return x_TI
        if how.scale_1 is None:
            values = quantise(x_TI, how.to)
        else:
            values = quantise_static(x_TI, how.to, how.scale_1.to(x_TI.device))
        return (values.values_TI.float() * values.scale_T[:, None]).to(x_TI.dtype)

    def _moe(
        self,
        x_TD: Tensor,
        router_TX: Tensor,
        gate_up_X2MD: Tensor,
        down_XDM: Tensor,
        n_active: int,
        normalise: bool,
        activation: str,
    ) -> Tensor:
        if self.see is None and not any(name.startswith("experts.") for name in self._rounded):
            return self._ops.moe(x_TD, router_TX, gate_up_X2MD, down_XDM, n_active, normalise, activation)
        weight_TA, expert_TA = route(router_TX, n_active, normalise)
        out_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for x, (gate_up_2MD, down_DM) in enumerate(zip(gate_up_X2MD, down_XDM, strict=True)):
            share_T = (weight_TA * (expert_TA == x)).sum(1)
            rows = (expert_TA == x).any(1)
            gate_TM, up_TM = (self._read(f"experts.{x}.gate_up", x_TD[rows]) @ gate_up_2MD.T).chunk(2, -1)
            mlp_TM = self._read(f"experts.{x}.down", gated(gate_TM, up_TM, activation))
            out_TD[rows] += (mlp_TM @ down_DM.T).float() * share_T[rows, None]
        return out_TD.to(x_TD.dtype)


class Memory:
    """A tensor of this process as a piece that weights are loaded from."""

    def __init__(self, tensor: Tensor) -> None:
        flat = tensor.detach().cpu().contiguous().flatten()
        self.dtype = _SPELLED[flat.dtype]
        self._data = flat.view(torch.uint8).numpy().data
        self.n_bytes = len(self._data)

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill the buffer with the bytes from `start`."""
        buffer[:] = self._data[start : start + len(buffer)]


def _one(config: ModelConfig, layer: int, vocab_size: int = 1) -> ModelConfig:
    """Return the config of a model of this one block, whose embedding only serves as its head."""
    return replace(config, layers=(config.layers[layer],), vocab_size=vocab_size, tied_head=True)


def _renamed(source: str, layer: int) -> str:
    return source.replace("model.layers.0.", f"model.layers.{layer}.", 1)
