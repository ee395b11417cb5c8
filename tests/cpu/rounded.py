"""transformers' model of a checkpoint with the rounded weights of an engine that was built of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from paged import load_engine_weights
from torch import Tensor
from twins import load_truth

from sailfish.artifact.reader import Artifact
from sailfish.checkpoint.names import TensorSpec
from sailfish.compress.rtn import restore_8
from sailfish.kernels.contract import Weight8
from sailfish.kernels.int4 import Int4Weight, dequantise
from sailfish.models.layers.linear import LinearWeight
from sailfish.plan.formats import engine_specs


def restored(weight: LinearWeight) -> Tensor:
    """Return the numbers that a weight stands for."""
    match weight:
        case Int4Weight():
            return dequantise(weight)
        case Weight8():
            return restore_8(weight.values_OI, weight.scale_O)
        case Tensor():
            return weight


def source_rows(spec: TensorSpec) -> Tensor:
    """Return which row of its sources, one after the other, each row of a weight is."""
    rows = torch.arange(spec.shape[0])
    if not spec.run:
        return rows
    halves = [torch.split(half, spec.run) for half in rows.chunk(2)]
    return torch.cat([run for turn in zip(*halves, strict=True) for run in turn])


def _as_8_bits_multiply(weight: Weight8, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return a linear in float64 whose activations are rounded as the contract says, written out plainly."""
    is_int8 = weight.values_OI.dtype == torch.int8

    def forward(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / (127.0 if is_int8 else 448.0)
        scale = torch.where(scale == 0, 1.0, scale)
        values = (x / scale).round() if is_int8 else (x / scale).to(torch.float8_e4m3fn)
        y = F.linear(values.double(), weight.values_OI.double()) * scale * weight.scale_O
        return (y if bias is None else y + bias).to(x.dtype)

    return forward


def rounded_truth(path: Path, engine: Artifact) -> Any:
    """Return the model in float32, with the numbers that the engine's weights stand for."""
    model = load_truth(path)
    weights = load_engine_weights(engine)
    for spec, format in engine_specs(engine.manifest.model, engine.manifest.plan.formats):
        order_O = source_rows(spec)
        if format == "plain" and spec.name != "head.weight":
            continue
        sources = ("lm_head.weight",) if spec.name == "head.weight" else spec.sources
        weight, start = weights[spec.name], 0
        for source, shape in zip(sources, spec.source_shapes, strict=True):
            module = model.get_submodule(source.removesuffix(".weight"))
            rows = order_O.argsort()[start : start + shape[0]]
            module.weight = torch.nn.Parameter(restored(weight)[rows])
            if isinstance(weight, Weight8) and isinstance(module, torch.nn.Linear):
                part = Weight8(weight.values_OI[rows], weight.scale_O[rows])
                setattr(module, "forward", _as_8_bits_multiply(part, module.bias))  # noqa: B010
            start += shape[0]
    if engine.manifest.model.tied_head and "head.weight" not in weights:
        embed = weights["embed.weight"]
        model.lm_head.weight = torch.nn.Parameter(restored(embed))
        if isinstance(embed, Weight8):
            model.lm_head.forward = _as_8_bits_multiply(embed, None)
    return model
