"""Turns quantization_config of config.json into a QuantConfig; what is not read is refused by its key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sailfish.base.errors import CheckpointError, UnsupportedModelError
from sailfish.checkpoint.files import Keys, read_json, shown
from sailfish.checkpoint.formats.compressed_config import read_compressed_config
from sailfish.checkpoint.formats.patterns import LINEAR_CLASSES, check_pattern
from sailfish.checkpoint.formats.scheme import LinearScheme, QuantConfig, Rule

_CONFIG = "config.json"
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
METHODS = ("gptq", "awq", "compressed-tensors")
MAX_GROUP = 1 << 20
_SKIP, _OVERRIDE = "-:", "+:"


def load_quant_config(directory: Path) -> QuantConfig | None:
    """Return how the checkpoint in a directory is quantised, None if it is not.

    What config.json says goes before the file that AutoGPTQ or AutoAWQ once left beside it. Raises as
    `read_quant_config` does.
    """
    path = directory / _CONFIG
    values = read_json(path).get("quantization_config")
    if values is None:
        for name, method in _BESIDE.items():
            if (directory / name).is_file():
                return read_quant_config({"quant_method": method, **read_json(directory / name)}, str(path))
        return None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: quantization_config is {shown(values)}; it must be an object")
    return read_quant_config(values, str(path))


def read_quant_config(values: Mapping[str, Any], where: str) -> QuantConfig:
    """Return what a `quantization_config` says; `where` names the file in errors.

    UnsupportedModelError for a method or feature that is not read, CheckpointError for contradictions.
    """
    keys = Keys(values, f"{where}: quantization_config")
    method = keys.text("quant_method").lower()
    if method == "gptq":
        return _gptq(keys)
    if method == "awq":
        return _awq(keys)
    if method == "compressed-tensors":
        return read_compressed_config(keys)
    raise UnsupportedModelError(
        f"{keys.where} has quant_method {shown(method)}; read are {', '.join(METHODS)}",
        hint="use the unquantised checkpoint",
        param="quantization_config",
    )


def _gptq(keys: Keys) -> QuantConfig:
    """AutoGPTQ's and GPTQModel's keys; `dynamic` maps expressions to other settings, or to none."""
    layout = keys.text_or("checkpoint_format", keys.text_or("format", "gptq")).lower()
    if layout not in ("gptq", "gptq_v2"):
        raise _unsupported(keys, "checkpoint_format", layout, "gptq and gptq_v2")
    if keys.text_or("pack_dtype", "int32") != "int32":
        raise _unsupported(keys, "pack_dtype", keys.values["pack_dtype"], "int32")

    def scheme(own: Keys) -> LinearScheme:
        group = _group(own, "group_size", keys.values.get("group_size", -1))
        bits = own.integer_or("bits", 2, 8, 0) or keys.integer("bits", 2, 8)
        if bits not in (2, 3, 4, 8):
            raise _unsupported(own, "bits", bits, "2, 3, 4 and 8")
        return LinearScheme(
            layout="gptq_v2" if layout == "gptq_v2" else "gptq",
            bits=bits,
            strategy="channel" if group is None else "group",
            group=group,
            symmetric=own.flag("sym", keys.flag("sym", True)),
            act_order=own.flag("desc_act", keys.flag("desc_act")),
        )

    rules = []
    dynamic = keys.object_or("dynamic")
    for pattern in dynamic.values if dynamic else ():
        assert dynamic is not None
        expression = check_pattern("re:" + pattern.removeprefix(_SKIP).removeprefix(_OVERRIDE), keys.where)
        other = (
            None if pattern.startswith(_SKIP) else scheme(dynamic.object_or(pattern) or Keys({}, keys.where))
        )
        rules.append(Rule(targets=(expression,), scheme=other))
    ignore = () if keys.flag("lm_head") else ("lm_head",)
    rules.append(Rule(targets=LINEAR_CLASSES[:1], scheme=scheme(keys)))
    return QuantConfig(method="gptq", rules=tuple(rules), ignore=ignore)


def _awq(keys: Keys) -> QuantConfig:
    version = keys.text_or("version", keys.text_or("format", "gemm")).lower()
    if version != "gemm":
        raise _unsupported(keys, "version", version, "gemm")
    bits = keys.integer("w_bit" if keys.has("w_bit") else "bits", 1, 8)
    if bits != 4:
        raise _unsupported(keys, "bits", bits, "4")
    group = _group(keys, "q_group_size" if keys.has("q_group_size") else "group_size", -1)
    scheme = LinearScheme(
        layout="awq",
        bits=bits,
        strategy="channel" if group is None else "group",
        group=group,
        symmetric=not keys.flag("zero_point", True),
    )
    dense = keys.list_or("modules_to_not_convert", lambda v: isinstance(v, str) and v != "", "names") or []
    ignore = tuple(check_pattern(f"in:{name}", keys.where) for name in ["lm_head", *dense])
    return QuantConfig(
        method="awq",
        rules=(Rule(targets=LINEAR_CLASSES[:1], scheme=scheme),),
        ignore=tuple(dict.fromkeys(ignore)),
    )


def _group(keys: Keys, key: str, default: Any) -> int | None:
    """Return how many inputs share a scale, None for all of a row, which these configs spell -1."""
    value = keys.values.get(key)
    filled = Keys({key: default if value is None else value}, keys.where)
    return None if filled.values[key] == -1 else filled.integer(key, 1, MAX_GROUP)


def _unsupported(keys: Keys, key: str, value: object, supported: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{keys.where}: {key} is {shown(value)}; read are {supported}",
        hint="use the unquantised checkpoint",
        param="quantization_config",
    )
