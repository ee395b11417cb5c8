"""Linear layers in 4 bits for any torch model: a module that takes the place of `torch.nn.Linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sailfish.base.errors import ConfigError
from sailfish.compress.gptq_layout import read_gptq
from sailfish.compress.rtn import quantise_int4
from sailfish.kernels import int4
from sailfish.kernels.int4 import GROUPS, STRIP, UNIT, Int4Weight
from sailfish.kernels.torch_op import multiply_int4
from sailfish.plan.formats import int4_sizes

_SCALES = (torch.bfloat16, torch.float16)
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""What a format's stored zeros lack."""


class W4Linear(torch.nn.Module):
    """Return x @ weight.T + bias with a weight of 4 bits; its kernel is chosen by shape, rows and device.

    Made by `from_linear` or `from_gptq`; called by itself, it makes an empty one to load a state into. On
    CUDA activations are in the dtype of the scales, bfloat16 or float16; on the CPU in any float dtype, and
    slow. All tensors are buffers: the weight does not train, gradients pass through to the activations.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    order: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: int | None = 128,
        symmetric: bool = True,
        ordered: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate a layer of zeros. `ordered`: with an order of its inputs, as GPTQ's act-order makes it."""
        super().__init__()
        if dtype not in _SCALES:
            raise ConfigError(f"scales in {dtype} are not supported", hint="use torch.bfloat16 or float16")
        rows, width, group = int4_sizes(out_features, in_features, _group(group, in_features))
        scales = torch.zeros(rows // STRIP, width // group, STRIP, dtype=dtype, device=device)
        packed = torch.zeros(rows // STRIP, width // UNIT, 32, 4, dtype=torch.int32, device=device)
        order = torch.arange(in_features, device=device) if ordered else None
        self._take(
            Int4Weight(
                packed=packed,
                scale=scales,
                zero=None if symmetric else torch.zeros_like(scales),
                n_out=out_features,
                n_in=in_features,
                group=group,
            ),
            torch.zeros(out_features, dtype=dtype, device=device) if bias else None,
            order,
        )

    @classmethod
    def from_linear(
        cls,
        linear: torch.nn.Linear,
        group: int | None = 128,
        symmetric: bool = True,
        *,
        dtype: torch.dtype | None = None,
    ) -> W4Linear:
        """Return a layer with the weight rounded to the nearest of 16 numbers, on the device it is on.

        `group` inputs share a scale: 32, 64, 128, or None for all of a row. `dtype` is that of the scales,
        bfloat16 or float16: by default the weight's, or bfloat16. BuildError if a weight is not finite.
        """
        weight_OI = linear.weight.detach()
        if weight_OI.device.type not in ("cpu", "cuda"):
            raise ConfigError(f"a weight on {weight_OI.device} cannot be quantised", hint="load it first")
        width = _group(group, weight_OI.shape[1])
        if dtype is None:
            dtype = weight_OI.dtype if weight_OI.dtype in _SCALES else torch.bfloat16
        packed = int4.pack(*quantise_int4(weight_OI, width, symmetric, dtype=dtype), dtype)
        return cls._of(packed, linear.bias)

    @classmethod
    def from_gptq(
        cls,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        g_idx: Tensor | None = None,
        *,
        bits: int = 4,
        bias: Tensor | None = None,
        checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq",
        dtype: torch.dtype | None = None,
    ) -> W4Linear:
        """Return a layer of the same numbers as one of a GPTQ checkpoint, on the device it is on.

        qweight int32 [I/8, O], qzeros int32 [G, O/8], scales [G, O] and g_idx int32 [I] are the
        checkpoint's tensors. "gptq" stores zeros minus one, "gptq_v2" as they are. `dtype` is that of the
        scales: by default their own, float16; in bfloat16 they are rounded. CheckpointError where the
        tensors do not fit each other, ConfigError for bits or groups that have no kernel.
        """
        if bits != 4:
            raise ConfigError(f"GPTQ weights of {bits} bits are not supported", hint="W4Linear has 4 bits")
        if checkpoint_format not in _ZERO_OFFSETS:
            raise ConfigError(
                f"GPTQ format {checkpoint_format!r} is unknown", hint=f"use {' or '.join(_ZERO_OFFSETS)}"
            )
        if dtype is None:
            dtype = scales.dtype if scales.dtype in _SCALES else torch.bfloat16
        code_OI, scale_OG, zero_OG, order = read_gptq(
            qweight, qzeros, scales, g_idx, zero_offset=_ZERO_OFFSETS[checkpoint_format]
        )
        return cls._of(int4.pack(code_OI, scale_OG, zero_OG, dtype), bias, order)

    @classmethod
    def _of(cls, weight: Int4Weight, bias: Tensor | None, order: Tensor | None = None) -> W4Linear:
        layer = cls.__new__(cls)
        torch.nn.Module.__init__(layer)
        layer._take(weight, None if bias is None else bias.detach().clone(), order)
        return layer

    def _take(self, weight: Int4Weight, bias: Tensor | None, order: Tensor | None) -> None:
        self.in_features, self.out_features, self.group = weight.n_in, weight.n_out, weight.group
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", weight.zero)
        self.register_buffer("bias", bias)
        self.register_buffer("order", order)

    @property
    def weight4(self) -> Int4Weight:
        """The packed weight, as the kernels take it; its inputs in the kernels' order."""
        return Int4Weight(
            packed=self.packed,
            scale=self.scale,
            zero=self.zero,
            n_out=self.out_features,
            n_in=self.in_features,
            group=self.group,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias: [..., in_features] to [..., out_features] in x's dtype."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        # The op takes parts, as torch can trace them; eager models are bound by what a call costs the host.
        shape = self.out_features, self.in_features, self.group
        return multiply_int4(x, self.packed, self.scale, self.zero, self.bias, *shape)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [O, I] written out, as `torch.nn.Linear` would hold it."""
        weight_OI = int4.dequantise(self.weight4, dtype)
        return weight_OI if self.order is None else weight_OI[:, self.order.argsort()]

    def extra_repr(self) -> str:
        """Return what `print` shows of the layer."""
        width = -(-self.in_features // UNIT) * UNIT
        words = [
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}",
            f"group={None if self.group >= width else self.group}, symmetric={self.zero is None}",
        ]
        return ", ".join([*words, *(["ordered=True"] if self.order is not None else [])])


def replace_linears(
    model: torch.nn.Module,
    *,
    group: int | None = 128,
    symmetric: bool = True,
    skip: Sequence[str] = ("lm_head",),
) -> int:
    """Put a W4Linear in the place of each `torch.nn.Linear` inside a model, and return how many it did.

    One after the other: beside the model it needs the memory of one layer. `skip` names layers to leave, by
    one or more parts of their dotted names: "lm_head", "layers.0", "self_attn.q_proj". Subclasses of Linear
    stay, for others read their weights. A layer that stands in several places is replaced once, in all.
    """
    _group(group, 1)
    places: dict[torch.nn.Linear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is torch.nn.Linear and name and not _is_skipped(name, skip):
            places.setdefault(module, []).append(name)
    n_replaced = len(places)
    while places:
        linear, names = places.popitem()
        layer = W4Linear.from_linear(linear, group, symmetric).train(linear.training)
        for name in names:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer)
    return n_replaced


def _is_skipped(name: str, skip: Sequence[str]) -> bool:
    return any(f".{part}." in f".{name}." for part in skip)


def _group(group: int | None, n_in: int) -> int:
    """Return how many inputs share a scale; ConfigError unless kernels know such groups."""
    if group is None:
        return n_in
    if group not in GROUPS:
        raise ConfigError(
            f"a group of {group} inputs is not supported",
            hint=f"use {', '.join(map(str, GROUPS))}, or None for all of a row",
        )
    return group
