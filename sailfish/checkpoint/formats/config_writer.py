"""Turns a QuantConfig into the quantization_config that the tools of its format read."""

from __future__ import annotations

from typing import Any

from sailfish.base.errors import ConfigError
from sailfish.checkpoint.formats.patterns import LINEAR_CLASSES
from sailfish.checkpoint.formats.scheme import ActivationScheme, LinearScheme, QuantConfig

_HEAD = "lm_head"


def write_quant_config(config: QuantConfig) -> dict[str, Any]:
    """Return the JSON object; `read_quant_config` of it gives the config again.

    ConfigError for what the format has no key for.
    """
    if config.method == "compressed-tensors":
        return _compressed(config)
    if not config.rules or config.rules[-1].targets != LINEAR_CLASSES[:1] or config.kv_cache is not None:
        raise ConfigError(f"{config.method} has one scheme for all linears, and none for the KV cache")
    scheme = config.rules[-1].scheme
    if scheme is None:
        raise ConfigError(f"{config.method} has no config in which linears are dense by default")
    return _gptq(config, scheme) if config.method == "gptq" else _awq(config, scheme)


def _gptq(config: QuantConfig, scheme: LinearScheme) -> dict[str, Any]:
    if set(config.ignore) - {_HEAD}:
        raise ConfigError(f"GPTQ names no dense linears but {_HEAD}, not {', '.join(config.ignore)}")
    dynamic: dict[str, Any] = {}
    for rule in config.rules[:-1]:
        if len(rule.targets) != 1 or not rule.targets[0].startswith("re:"):
            raise ConfigError(f"GPTQ names linears by one expression, not by {', '.join(rule.targets)}")
        expression = rule.targets[0][3:]
        dynamic[f"{'+' if rule.scheme else '-'}:{expression}"] = (
            _gptq_keys(rule.scheme) if rule.scheme else {}
        )
    return {
        "quant_method": "gptq",
        **_gptq_keys(scheme),
        "lm_head": _HEAD not in config.ignore,
        "checkpoint_format": scheme.layout,
        "pack_dtype": "int32",
    } | ({"dynamic": dynamic} if dynamic else {})


def _gptq_keys(scheme: LinearScheme) -> dict[str, Any]:
    return {
        "bits": scheme.bits,
        "group_size": scheme.group or -1,
        "desc_act": scheme.act_order,
        "sym": scheme.symmetric,
    }


def _awq(config: QuantConfig, scheme: LinearScheme) -> dict[str, Any]:
    if len(config.rules) != 1 or not all(pattern.startswith("in:") for pattern in config.ignore):
        raise ConfigError("AWQ has one scheme, and names dense linears by a part of their names")
    dense = [pattern[3:] for pattern in config.ignore if pattern != f"in:{_HEAD}"]
    return {
        "quant_method": "awq",
        "bits": scheme.bits,
        "group_size": scheme.group or -1,
        "zero_point": not scheme.symmetric,
        "version": "gemm",
        "modules_to_not_convert": dense or None,
    }


def _compressed(config: QuantConfig) -> dict[str, Any]:
    groups = {}
    for number, rule in enumerate(config.rules):
        if rule.scheme is None:
            raise ConfigError("compressed-tensors names dense linears under ignore, not as a group")
        groups[f"group_{number}"] = {
            "format": rule.scheme.layout,
            "targets": list(rule.targets),
            "weights": _weights(rule.scheme),
            "input_activations": _activations(rule.scheme.activations),
            "output_activations": None,
        }
    layouts = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(config.ignore),
        "kv_cache_scheme": _activations(config.kv_cache),
    }


def _weights(scheme: LinearScheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "float" if scheme.is_float else "int",
        "symmetric": scheme.symmetric,
        "strategy": scheme.strategy,
        "group_size": scheme.group,
        "actorder": "group" if scheme.act_order else None,
        "dynamic": False,
    }


def _activations(scheme: ActivationScheme | None) -> dict[str, Any] | None:
    if scheme is None:
        return None
    return {
        "num_bits": 8,
        "type": scheme.kind,
        "symmetric": True,
        "strategy": scheme.strategy,
        "dynamic": scheme.dynamic,
    }
