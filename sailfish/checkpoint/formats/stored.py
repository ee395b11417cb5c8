"""Says what the weights of a quantised checkpoint are in an engine: kept in their bits, or restored."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sailfish.base.errors import UnsupportedModelError
from sailfish.checkpoint.formats.codec import schemes_of
from sailfish.checkpoint.formats.scheme import LinearScheme, QuantConfig
from sailfish.checkpoint.formats.tensors import StoredTensor
from sailfish.checkpoint.model_config import ModelConfig, StoredWeights
from sailfish.checkpoint.names import LAYER_WEIGHT, linear_modules, tensor_specs
from sailfish.checkpoint.safetensors_reader import Checkpoint

GROUPS = (128, 64, 32)
"""Inputs that may share a scale in an engine's 4-bit weights, widest first; wider groups are cut up."""

_Format = Literal["plain", "int4", "int8", "fp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """What an engine can multiply a weight in without restoring it."""

    format: _Format
    group: int = GROUPS[0]
    zero_points: bool = False
    ordered: bool = False
    """Its inputs are in an order of their own."""
    static: bool = False
    """All its inputs have one scale, found by calibration."""


def stored_weights(model: ModelConfig, config: QuantConfig, checkpoint: Checkpoint) -> StoredWeights:
    """Return what an engine makes of a checkpoint that is quantised as `config` says.

    Weights of attention and MLP keep their format where an engine has it; the others are restored, and
    `restored` says why. CheckpointError where the tensors contradict the config.
    """
    schemes = checkpoint_schemes(config, model, checkpoint)
    reasons: list[str] = []
    found: dict[str, _Kept | None] = {}
    for spec in tensor_specs(model):
        its = [schemes[module] for module in linear_modules(spec)]
        if not any(its):
            if LAYER_WEIGHT.fullmatch(spec.name):
                found[spec.name] = None
            continue
        if LAYER_WEIGHT.fullmatch(spec.name):
            orders = [_order(checkpoint, module) for module in linear_modules(spec)]
            scales = {_input_scale(checkpoint, module) for module in linear_modules(spec)}
            found[spec.name] = _kept_of(its, orders, len(scales) == 1, reasons)
        else:
            kind = (
                spec.name.split(".")[2:-1] if spec.name.startswith("layers.") else spec.name.split(".")[:-1]
            )
            reasons.append(f"no kernel has a quantised {' '.join(kind)}")
    formats = Counter(kept.format for kept in found.values() if kept is not None)
    format = formats.most_common(1)[0][0] if formats else None
    each: dict[str, _Format] = {
        name: "plain" if kept is None else kept.format for name, kept in found.items()
    }
    in_4_bits = [kept for kept in found.values() if kept is not None and kept.format == "int4"]
    return StoredWeights(
        format=format or "plain",
        group=min((kept.group for kept in in_4_bits), default=GROUPS[0]),
        zero_points=any(kept.zero_points for kept in in_4_bits),
        ordered=tuple(name for name, kept in found.items() if kept is not None and kept.ordered),
        static=tuple(name for name, kept in found.items() if kept is not None and kept.static),
        others=tuple((name, other) for name, other in each.items() if other != format) if format else (),
        words=_words(config, [scheme for scheme in schemes.values() if scheme is not None]),
        restored="; ".join(dict.fromkeys(reasons)) or None,
    )


def checkpoint_schemes(
    config: QuantConfig, model: ModelConfig, checkpoint: Checkpoint
) -> dict[str, LinearScheme | None]:
    """Return how each linear of the model is stored, by the checkpoint's name for it; None: dense."""
    modules = [module for spec in tensor_specs(model) for module in linear_modules(spec)]
    return schemes_of(config, modules, checkpoint.tensors)


def keeps(scheme: LinearScheme) -> str | None:
    """Return why an engine restores a linear of this scheme, None where it multiplies it as it is."""
    found = _kept(scheme)
    return found if isinstance(found, str) else None


def _kept(scheme: LinearScheme) -> _Kept | str:
    """Return what a scheme is kept as, or in words why it is not."""
    activations = scheme.activations
    if scheme.bits < 8:
        if activations is not None:
            return f"no kernel multiplies {scheme.bits}-bit weights with 8-bit activations"
        if scheme.bits > 4:
            return f"no kernel has weights of {scheme.bits} bits"
        group = next((g for g in GROUPS if (scheme.group or GROUPS[0]) % g == 0), None)
        if group is None:
            return f"no kernel has groups of {scheme.group} inputs"
        return _Kept(format="int4", group=group, zero_points=not scheme.symmetric)
    if activations is None:
        return "no kernel multiplies 8-bit weights with activations that stay as they are"
    if scheme.strategy == "group" or not scheme.symmetric:
        return "no kernel has 8-bit weights with groups or zero points"
    if (activations.kind == "float") is not scheme.is_float:
        return "no kernel multiplies whole numbers with float8"
    return _Kept(format="fp8" if scheme.is_float else "int8", static=not activations.dynamic)


def _order(checkpoint: Checkpoint, module: str) -> NDArray[np.int64] | None:
    """Return a linear's inputs sorted by their group, None where they are sorted."""
    names = (f"{module}.g_idx", f"{module}.weight_g_idx")
    name = next((name for name in names if name in checkpoint.tensors), None)
    if name is None:
        return None
    order = np.argsort(StoredTensor.from_checkpoint(checkpoint, name).array, kind="stable")
    return None if np.array_equal(order, np.arange(len(order))) else order


def _input_scale(checkpoint: Checkpoint, module: str) -> bytes | None:
    """Return the static scale of a linear's inputs as it is stored, None where it has none."""
    name = f"{module}.input_scale"
    return bytes(checkpoint.bytes(name)) if name in checkpoint.tensors else None


def is_same_order(order: NDArray[np.int64] | None, other: NDArray[np.int64] | None) -> bool:
    """Say whether two orders of inputs are one; None: as the model has them."""
    return order is other if order is None or other is None else np.array_equal(order, other)


def _kept_of(
    schemes: list[LinearScheme | None],
    orders: list[NDArray[np.int64] | None],
    has_one_scale: bool,
    reasons: list[str],
) -> _Kept | None:
    """Return what a weight of several linears' rows is kept as; None, with the reason added: restored."""
    kept: list[_Kept] = []
    for scheme in schemes:
        found = "it shares a product with a dense one" if scheme is None else _kept(scheme)
        if isinstance(found, str):
            reasons.append(found)
            return None
        kept.append(found)
    if len({(one.format, one.static) for one in kept}) > 1:
        reasons.append("linears that share a product are in several formats")
        return None
    if kept[0].static and not has_one_scale:
        reasons.append("linears that share a product have several static scales of their inputs")
        return None
    first = orders[0]
    if not all(is_same_order(order, first) for order in orders):
        reasons.append("linears that share a product have their inputs in several orders")
        return None
    return _Kept(
        format=kept[0].format,
        ordered=first is not None,
        static=kept[0].static,
        group=min(one.group for one in kept),
        zero_points=any(one.zero_points for one in kept),
    )


def _words(config: QuantConfig, schemes: list[LinearScheme]) -> str:
    if not schemes and config.kv_cache is not None:
        return f"{config.method}, dense weights, scales of an 8-bit KV cache"
    if not schemes:
        raise UnsupportedModelError(
            "quantization_config is there, but no linear is quantised",
            hint="if the weights are dense remove it from config.json, and quantize_config.json with it",
            param="quantization_config",
        )
    return f"{config.method}, {' and '.join(dict.fromkeys(map(scheme_words, schemes)))}"


def scheme_words(scheme: LinearScheme) -> str:
    """Return a scheme in words, as in "4 bits in groups of 128, asymmetric, act-order"."""
    kind = "float8" if scheme.is_float else f"{scheme.bits} bits"
    share = f"in groups of {scheme.group}" if scheme.group else f"by {scheme.strategy}"
    words = [f"{kind} {share}"]
    words += [] if scheme.symmetric else ["asymmetric"]
    words += ["act-order"] if scheme.act_order else []
    if scheme.activations is not None:
        how = "dynamic" if scheme.activations.dynamic else "static"
        words.append(f"{how} {'float8' if scheme.activations.kind == 'float' else 'int8'} activations")
    return ", ".join(words)
