"""Rewrites a quantised checkpoint in another format, exactly, or says which layer stands against it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import numpy as np

from sailfish.base.errors import CheckpointError, ConfigError
from sailfish.checkpoint.files import read_bytes, read_json
from sailfish.checkpoint.formats.codec import layer_tensors, quantised_modules, read_linear, write_linear
from sailfish.checkpoint.formats.config import read_quant_config
from sailfish.checkpoint.formats.config_writer import write_quant_config
from sailfish.checkpoint.formats.linear import QuantisedLinear
from sailfish.checkpoint.formats.patterns import LINEAR_CLASSES
from sailfish.checkpoint.formats.scheme import Layout, LinearScheme, Method, QuantConfig, Rule
from sailfish.checkpoint.formats.writer import CheckpointWriter
from sailfish.checkpoint.safetensors_reader import Checkpoint

_CONFIG = "config.json"
_HEAD = "lm_head"
_SMALL_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_MAX_SMALL_BYTES = 256 << 20


def convert(source: Path, out: Path, layout: Layout, tell: Callable[[int, int], None]) -> QuantConfig:
    """Write the checkpoint in `source` to the new directory `out` with its linears stored in `layout`.

    Every restored weight is the same number before and after. `tell` is told (tensors done, in all). Returns
    the config written. CheckpointError for a bad or dense source, ConfigError for what `layout` cannot hold.
    """
    values = read_json(source / _CONFIG)
    if not isinstance(values.get("quantization_config"), dict):
        raise CheckpointError(f"{source} is not quantised", hint="compress it first")
    config = read_quant_config(values["quantization_config"], str(source / _CONFIG))
    checkpoint = Checkpoint.open(source)
    modules = quantised_modules(checkpoint.tensors)
    schemes = {module: _scheme_of(config, module) for module in modules}
    if _HEAD in schemes:
        raise ConfigError(f"{_HEAD} is quantised, which is not rewritten")
    target = _config_as(config, layout, set(schemes.values()), _dense_linears(checkpoint, schemes))
    values["quantization_config"] = write_quant_config(target)
    small = {
        name: read_bytes(source / name, _MAX_SMALL_BYTES)
        for name in _SMALL_FILES
        if (source / name).is_file()
    }
    owner_of = {name: name.rpartition(".")[0] for name in checkpoint.tensors}
    n_done = 0
    with CheckpointWriter(out) as writer:
        for module in modules:
            tensors = layer_tensors(checkpoint, module)
            linear = read_linear(tensors, schemes[module], module)
            scheme = target.scheme_of(module)
            assert scheme is not None, module
            for part, tensor in write_linear(_in_usual_scales(linear, layout), scheme, module).items():
                writer.add(f"{module}.{part}", tensor)
            n_done += len(tensors)
            tell(n_done, len(owner_of))
        for name, owner in owner_of.items():
            if owner not in schemes or name == f"{owner}.bias":
                writer.copy(checkpoint.tensors[name], checkpoint.bytes(name))
        tell(len(owner_of), len(owner_of))
        writer.finish({**small, _CONFIG: json.dumps(values, indent=2).encode()})
    return target


def scheme_as(scheme: LinearScheme, layout: Layout) -> LinearScheme:
    """Return the scheme that holds in `layout` what another holds in its own; `rejects` says if it can."""
    if layout == "awq":  # its zero points are always there and its inputs never reordered
        return replace(scheme, layout=layout, symmetric=False, act_order=False)
    return replace(scheme, layout=layout)


def _scheme_of(config: QuantConfig, module: str) -> LinearScheme:
    scheme = config.scheme_of(module)
    if scheme is None:
        raise CheckpointError(f"{module} is quantised, but quantization_config leaves it dense")
    return scheme


def _config_as(
    config: QuantConfig, layout: Layout, found: set[LinearScheme], dense: list[str]
) -> QuantConfig:
    """Return a config of `layout` for quantised linears of the schemes found and dense ones so named."""
    method: Method = "compressed-tensors"
    if layout in ("gptq", "gptq_v2", "awq"):
        method = "awq" if layout == "awq" else "gptq"
    if method == config.method:
        rules = [
            rule if rule.scheme is None else replace(rule, scheme=scheme_as(rule.scheme, layout))
            for rule in config.rules
        ]
        return replace(config, rules=tuple(rules))
    if len(found) != 1:
        raise ConfigError(f"linears are stored in {len(found)} ways; {layout} is written of one")
    if config.kv_cache is not None:
        raise ConfigError(f"{layout} has no scales of the KV cache")
    linear = Rule(targets=LINEAR_CLASSES[:1], scheme=scheme_as(next(iter(found)), layout))
    if method == "gptq":
        skipped = [Rule(targets=(f"re:^{re.escape(name)}$",), scheme=None) for name in dense]
        return QuantConfig(method=method, rules=(*skipped, linear), ignore=(_HEAD,))
    ignore = (_HEAD, *dense)
    if method == "awq":
        ignore = tuple(f"in:{name}" for name in ignore)
    return QuantConfig(method=method, rules=(linear,), ignore=ignore)


def _dense_linears(checkpoint: Checkpoint, quantised: Collection[str]) -> list[str]:
    """Return the blocks' modules that have a matrix and are not quantised, such as an expert router."""
    owners = [
        name.removesuffix(".weight")
        for name, ref in checkpoint.tensors.items()
        if name.endswith(".weight") and len(ref.shape) == 2
    ]
    return sorted(
        owner
        for owner in owners
        if owner not in quantised and any(part.isdigit() for part in owner.split("."))
    )


def _in_usual_scales(linear: QuantisedLinear, layout: Layout) -> QuantisedLinear:
    """Return the layer with scales in F16, which kernels for GPTQ and AWQ take, where that is exact."""
    if layout in ("gptq", "gptq_v2", "awq"):
        with np.errstate(over="ignore"):
            if np.array_equal(linear.scale_OG.astype(np.float16).astype(np.float32), linear.scale_OG):
                return replace(linear, scale_dtype="F16")
    return linear
