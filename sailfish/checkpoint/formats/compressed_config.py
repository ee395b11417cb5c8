"""Reads the quantization_config of compressed-tensors: groups of targets, each with a scheme.

https://github.com/vllm-project/compressed-tensors (quantization/quant_config.py, quant_args.py).
"""

from __future__ import annotations

from typing import Literal, cast

from sailfish.base.errors import CheckpointError, UnsupportedModelError
from sailfish.checkpoint.files import Keys, shown
from sailfish.checkpoint.formats.patterns import check_pattern
from sailfish.checkpoint.formats.scheme import (
    ActivationScheme,
    Layout,
    LinearScheme,
    QuantConfig,
    Rule,
    Strategy,
)

MAX_PATTERNS = 10_000
_LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized")
_MAX_GROUP = 1 << 20
_LEFT_EMPTY = ("sparsity_config", "transform_config", "moe_sparsity_config")


def read_compressed_config(keys: Keys) -> QuantConfig:
    """Return the rules of a config whose weights are stored compressed."""
    status = keys.text_or("quantization_status", "compressed")
    if status != "compressed":
        raise _unsupported(keys, "quantization_status", status, "compressed")
    for key in _LEFT_EMPTY:
        other = keys.object_or(key)
        if other and any(other.has(part) for part in other.values) and other.values.get("format") != "dense":
            raise UnsupportedModelError(
                f"{keys.where}: {key} is {shown(dict(other.values))}; only weights without it are read",
                param="quantization_config",
            )
    cache = keys.object_or("kv_cache_scheme")
    groups = keys.object_or("config_groups") or Keys({}, keys.where)
    if not groups.values and cache is None:
        raise CheckpointError(f"{keys.where} lacks config_groups", param="quantization_config")
    rules = []
    for name in groups.values:
        if isinstance(groups.values[name], list):
            raise UnsupportedModelError(
                f"{groups.where}: {shown(name)} is the name of a scheme, which is not read",
                hint="save the checkpoint again with compressed-tensors, which writes the scheme out",
            )
        group = groups.object_or(name)
        if group is None:
            raise CheckpointError(f"{groups.where}: {shown(name)} is empty", param="quantization_config")
        rules.append(_rule(group, group.text_or("format", keys.text_or("format", "pack-quantized"))))
    return QuantConfig(
        method="compressed-tensors",
        rules=tuple(rules),
        ignore=_patterns(keys, "ignore"),
        kv_cache=None if cache is None else _activations(cache),
    )


def _rule(group: Keys, layout: str) -> Rule:
    targets = _patterns(group, "targets")
    if group.object_or("output_activations"):
        raise UnsupportedModelError(f"{group.where}: output_activations are not read")
    weights, inputs = group.object_or("weights"), group.object_or("input_activations")
    if weights is None:
        if inputs is not None:
            raise UnsupportedModelError(f"{group.where}: input_activations without weights are not read")
        return Rule(targets=targets, scheme=None)
    if layout not in _LAYOUTS:
        raise _unsupported(group, "format", layout, ", ".join(_LAYOUTS))
    activations = None if inputs is None else _activations(inputs)
    return Rule(targets=targets, scheme=_weights(weights, cast(Layout, layout), activations))


def _weights(keys: Keys, layout: Layout, activations: ActivationScheme | None) -> LinearScheme:
    kind = keys.text_or("type", "int").lower()
    bits = keys.integer_or("num_bits", 1, 16, 8)
    size = keys.values.get("group_size")
    group = None if size in (None, -1) else keys.integer("group_size", 1, _MAX_GROUP)
    implied = "group" if group else "channel" if size == -1 else "tensor"
    strategy = keys.text_or("strategy", implied).lower()
    is_float = layout == "float-quantized"
    if kind != ("float" if is_float else "int") or not (
        bits == 8 if layout != "pack-quantized" else bits <= 8
    ):
        raise CheckpointError(f"{keys.where}: {layout} does not hold {bits} bits of type {shown(kind)}")
    if strategy not in ("tensor", "channel", "group") or (group is not None) is not (strategy == "group"):
        raise _unsupported(
            keys, "strategy", strategy, "channel, tensor, and group with group_size; in blocks no weights"
        )
    if keys.values.get("dynamic") not in (None, False):
        raise _unsupported(keys, "dynamic", keys.values["dynamic"], "false")
    symmetric = keys.flag("symmetric", True)
    if is_float and not symmetric:
        raise CheckpointError(f"{keys.where}: float-quantized weights have no zero points")
    if strategy == "tensor" and not symmetric:
        raise _unsupported(keys, "strategy", strategy, "channel and group where weights have zero points")
    order = keys.values.get("actorder")
    if order not in (None, False, True, "weight", "static", "group", "dynamic"):
        raise _unsupported(keys, "actorder", order, "weight, static, group and dynamic")
    return LinearScheme(
        layout=layout,
        bits=bits,
        strategy=cast(Strategy, strategy),
        group=group,
        symmetric=symmetric,
        act_order=order in (True, "group", "dynamic"),
        activations=activations,
    )


def _activations(keys: Keys) -> ActivationScheme:
    kind = keys.text_or("type", "int").lower()
    bits = keys.integer_or("num_bits", 1, 16, 8)
    strategy = keys.text_or("strategy", "tensor").lower()
    dynamic = keys.values.get("dynamic", False)
    if kind not in ("int", "float") or bits != 8:
        raise _unsupported(keys, "num_bits", f"{bits} ({kind})", "8 bits of type int or float")
    if dynamic not in (None, False, True):
        raise _unsupported(keys, "dynamic", dynamic, "true and false")
    if not keys.flag("symmetric", True):
        raise _unsupported(keys, "symmetric", False, "true: activations have no zero points")
    if strategy not in ("tensor", "token") or (strategy == "token" and not dynamic):
        raise _unsupported(keys, "strategy", strategy, "tensor, and token where dynamic")
    return ActivationScheme(
        kind=cast(Literal["int", "float"], kind),
        dynamic=bool(dynamic),
        strategy=cast(Literal["tensor", "token"], strategy),
    )


def _patterns(keys: Keys, key: str) -> tuple[str, ...]:
    found = keys.list_or(key, lambda v: isinstance(v, str) and v != "", "module names") or []
    if len(found) > MAX_PATTERNS:
        raise CheckpointError(
            f"{keys.where}: {key} has {len(found)} patterns, at most {MAX_PATTERNS} are read"
        )
    if any(pattern.startswith("in:") for pattern in found):
        raise CheckpointError(f"{keys.where}: {key} holds a module name that begins with in:")
    return tuple(check_pattern(pattern, keys.where) for pattern in found)


def _unsupported(keys: Keys, key: str, value: object, supported: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{keys.where}: {key} is {shown(value)}; read are {supported}", param="quantization_config"
    )
