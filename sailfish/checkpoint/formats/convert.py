"""Rewrites a quantised checkpoint in another format, exactly, or says which layer stands against it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sailfish.base.errors import CheckpointError, ConfigError
from sailfish.checkpoint.files import read_bytes, read_json
from sailfish.checkpoint.formats.codec import layer_tensors, quantised_modules, read_linear, write_linear
from sailfish.checkpoint.formats.config import load_quant_config
from sailfish.checkpoint.formats.config_writer import write_quant_config
from sailfish.checkpoint.formats.linear import QuantisedLinear
from sailfish.checkpoint.formats.patterns import LINEAR_CLASSES
from sailfish.checkpoint.formats.scheme import Layout, LinearScheme, Method, QuantConfig, Rule
from sailfish.checkpoint.formats.tensors import FloatType, StoredTensor
from sailfish.checkpoint.formats.writer import CheckpointWriter
from sailfish.checkpoint.safetensors_reader import Checkpoint

Target = Literal["gptq", "gptq_v2", "awq", "compressed-tensors"]
"""A format by the name that `quantization_config` has for it."""
CACHE_SCALE = re.compile(r"\.([kvq]_scale|[kvq]_proj\.output_scale)$")
"""The static scales of an 8-bit KV cache, which lie beside the linears."""
_CONFIG = "config.json"
_HEAD = "lm_head"
SMALL_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
"""What is copied beside the weights, where it is there."""
MAX_SMALL_BYTES = 256 << 20


def convert(source: Path, out: Path, layout: Layout, tell: Callable[[int, int], None]) -> QuantConfig:
    """Write the checkpoint in `source` to the new directory `out` with its linears stored in `layout`.

    Every restored weight is the same number before and after. `tell` is told (tensors done, in all). Returns
    the config written. CheckpointError for a bad or dense source, ConfigError for what `layout` cannot hold.
    """
    values, config, checkpoint, schemes = _opened(source)
    if _HEAD in schemes:
        raise ConfigError(f"{_HEAD} is quantised, which is not rewritten")
    target = _config_as(config, layout, set(schemes.values()), _dense_linears(checkpoint, schemes))
    values["quantization_config"] = write_quant_config(target)
    owner_of = {name: name.rpartition(".")[0] for name in checkpoint.tensors}
    n_done = 0
    with CheckpointWriter(out) as writer:
        for module, its in schemes.items():
            tensors = layer_tensors(checkpoint, module)
            linear = read_linear(tensors, its, module)
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
        writer.finish({**_small_files(source), _CONFIG: json.dumps(values, indent=2).encode()})
    return target


def restore(source: Path, out: Path, dtype: FloatType, tell: Callable[[int, int], None]) -> None:
    """Write the checkpoint in `source` to the new directory `out` with its quantised linears dense.

    A restored weight is code less zero times scale, rounded to float32 once; to BF16 or F16 from there.
    Other tensors are copied, scales of an 8-bit KV cache left out. Roundings of activations are lost: a
    dense checkpoint has none. `tell` is told (tensors done, in all). CheckpointError for a bad or dense
    source, ConfigError where F16 cannot hold a weight.
    """
    values, _, checkpoint, schemes = _opened(source)
    values.pop("quantization_config", None)
    values.pop("torch_dtype", None)
    values["dtype"] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[dtype]
    owner_of = {name: name.rpartition(".")[0] for name in checkpoint.tensors}
    n_done = 0
    with CheckpointWriter(out) as writer:
        for module, scheme in schemes.items():
            tensors = layer_tensors(checkpoint, module)
            weight = read_linear(tensors, scheme, module).dequantise()
            writer.add(f"{module}.weight", StoredTensor.rounded(weight, dtype, module))
            n_done += len(tensors)
            tell(n_done, len(owner_of))
        for name, owner in owner_of.items():
            if (owner not in schemes or name == f"{owner}.bias") and not CACHE_SCALE.search(name):
                writer.copy(checkpoint.tensors[name], checkpoint.bytes(name))
        tell(len(owner_of), len(owner_of))
        writer.finish({**_small_files(source), _CONFIG: json.dumps(values, indent=2).encode()})


def layout_of(target: Target, source: Path) -> Layout:
    """Return the layout that a target's name means for a checkpoint: compressed-tensors has three.

    Raises CheckpointError for a bad or dense source, ConfigError where its linears would need several.
    """
    if target != "compressed-tensors":
        return target
    layouts: set[Layout] = {_compressed_layout(scheme) for scheme in _opened(source)[3].values()}
    if len(layouts) != 1:
        raise ConfigError(f"{source} would need {' and '.join(sorted(layouts))} at once; one is written")
    return layouts.pop()


def _compressed_layout(scheme: LinearScheme) -> Layout:
    if scheme.is_float:
        return "float-quantized"
    is_plain_8 = scheme.bits == 8 and scheme.group is None and scheme.activations is not None
    return "int-quantized" if is_plain_8 else "pack-quantized"


def _opened(source: Path) -> tuple[dict[str, Any], QuantConfig, Checkpoint, dict[str, LinearScheme]]:
    """Return config.json, its quantisation, the tensors, and the scheme of every quantised linear."""
    values, config = read_json(source / _CONFIG), load_quant_config(source)
    if config is None:
        raise CheckpointError(f"{source} is not quantised", hint="compress it first")
    checkpoint = Checkpoint.open(source)
    schemes = {module: _scheme_of(config, module) for module in quantised_modules(checkpoint.tensors)}
    return values, config, checkpoint, schemes


def _small_files(source: Path) -> dict[str, bytes]:
    return {
        name: read_bytes(source / name, MAX_SMALL_BYTES) for name in SMALL_FILES if (source / name).is_file()
    }


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
