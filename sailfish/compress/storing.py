"""Writes a compressed checkpoint, tensor by tensor as its blocks are done, then its config. No torch."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sailfish.base.errors import ConfigError
from sailfish.checkpoint.files import read_bytes, read_json
from sailfish.checkpoint.formats.codec import write_linear
from sailfish.checkpoint.formats.config_writer import write_quant_config
from sailfish.checkpoint.formats.convert import MAX_SMALL_BYTES, SMALL_FILES
from sailfish.checkpoint.formats.linear import QuantisedLinear
from sailfish.checkpoint.formats.patterns import LINEAR_CLASSES
from sailfish.checkpoint.formats.scheme import ActivationScheme, LinearScheme, Method, QuantConfig, Rule
from sailfish.checkpoint.formats.tensors import StoredTensor
from sailfish.checkpoint.formats.writer import CheckpointWriter
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.compress.cut import config_values
from sailfish.compress.recipe import Recipe, Round

_CONFIG = "config.json"
_HEAD = "lm_head"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class Store:
    """Where a compressed checkpoint goes: tensors are counted, and written where there is a writer.

    Names are the parent's.
    """

    def __init__(self, source: Path, checkpoint: Checkpoint, recipe: Recipe, writer: CheckpointWriter | None):
        self._source = source
        self._checkpoint = checkpoint
        self._recipe = recipe
        self._writer = writer
        self._schemes: dict[str, LinearScheme] = {}
        self._written: set[str] = set()
        self._smaller: ModelConfig | None = None
        self._kept: Sequence[int] | None = None
        self.n_bytes = 0

    def shrink(self, config: ModelConfig, kept: Sequence[int]) -> None:
        """Have the checkpoint be one of `config`, whose layers are those `kept` of the parent, ascending."""
        self._smaller = config
        self._kept = kept

    def linear(self, module: str, linear: QuantisedLinear) -> int:
        """Take a rounded linear, and return the bytes that it is stored in."""
        rounding = self._recipe.round_of(module)
        assert rounding is not None and self._recipe.layout != "dense"
        scheme = scheme_of(self._recipe, rounding)
        self._schemes[self._new(module)] = scheme
        before = self.n_bytes
        for part, tensor in write_linear(linear, scheme, module).items():
            self._add(f"{module}.{part}", tensor)
        self._written.add(f"{module}.weight")
        return self.n_bytes - before

    def dense(self, name: str, tensor: StoredTensor) -> None:
        """Take a tensor that is not the parent's."""
        self._add(name, tensor)
        self._written.add(name)

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Copy all tensors that were not given, then write the config, the tokenizer and `files`."""
        self.copy_rest()
        if self._writer is None:
            return
        values = read_json(self._source / _CONFIG)
        if self._smaller is not None:
            values = config_values(values, self._smaller)
        if self._schemes:
            values["quantization_config"] = self.quant_config()
        small = {
            name: read_bytes(self._source / name, MAX_SMALL_BYTES)
            for name in SMALL_FILES
            if (self._source / name).is_file()
        }
        self._writer.finish({**small, **files, _CONFIG: json.dumps(values, indent=2).encode()})

    def copy_rest(self) -> None:
        """Copy all tensors of the parent that were not given, but those of layers that are gone."""
        for name, ref in self._checkpoint.tensors.items():
            if name not in self._written and not self._is_gone(name):
                if self._writer is not None:
                    self._writer.copy(replace(ref, name=self._new(name)), self._checkpoint.bytes(name))
                self.n_bytes += ref.n_bytes
                self._written.add(name)

    def quant_config(self) -> dict[str, Any]:
        """Return the quantization_config of what was taken; ConfigError for what the format cannot say."""
        dense = sorted(
            self._new(name).removesuffix(".weight")
            for name, ref in self._checkpoint.tensors.items()
            if name.endswith(".weight") and len(ref.shape) == 2 and any(p.isdigit() for p in name.split("."))
            if not self._is_gone(name)
        )
        dense = [module for module in dense if module not in self._schemes]
        return write_quant_config(_config(self._schemes, dense))

    def _is_gone(self, name: str) -> bool:
        found = _LAYER.match(name)
        return self._kept is not None and found is not None and int(found[1]) not in self._kept

    def _new(self, name: str) -> str:
        """Return what a tensor or module of the parent that is not gone is called."""
        kept = self._kept
        return name if kept is None else _LAYER.sub(lambda m: f"model.layers.{kept.index(int(m[1]))}.", name)

    def _add(self, name: str, tensor: StoredTensor) -> None:
        if self._writer is not None:
            self._writer.add(self._new(name), tensor)
        self.n_bytes += tensor.array.nbytes


def scheme_of(recipe: Recipe, rounding: Round) -> LinearScheme:
    """Return how linears that are rounded so are stored in the recipe's layout."""
    assert recipe.layout != "dense"
    activations = None
    if recipe.activations != "none":
        is_dynamic = recipe.activations == "dynamic"
        activations = ActivationScheme(
            kind="float" if recipe.layout == "float-quantized" else "int",
            dynamic=is_dynamic,
            strategy="token" if is_dynamic else "tensor",
        )
    return LinearScheme(
        layout=recipe.layout,
        bits=rounding.bits,
        strategy="channel" if rounding.group is None else "group",
        group=rounding.group,
        symmetric=rounding.symmetric and recipe.layout != "awq",
        activations=activations,
    )


def _config(schemes: Mapping[str, LinearScheme], dense: list[str]) -> QuantConfig:
    layouts = {scheme.layout for scheme in schemes.values()}
    if len(layouts) != 1:
        raise ConfigError(f"linears are stored in {len(layouts)} layouts")
    layout = next(iter(layouts))
    usual = Counter(schemes.values()).most_common(1)[0][0]
    others: dict[LinearScheme, list[str]] = {}
    for module, scheme in schemes.items():
        if scheme != usual:
            others.setdefault(scheme, []).append(module)
    rest = Rule(targets=LINEAR_CLASSES[:1], scheme=usual)
    method: Method = "compressed-tensors"
    if layout in ("gptq", "gptq_v2"):
        method = "gptq"
        rules = [Rule(targets=(f"re:^{re.escape(m)}$",), scheme=None) for m in dense]
        rules += [Rule(targets=(f"re:^{re.escape(m)}$",), scheme=s) for s, ms in others.items() for m in ms]
        return QuantConfig(method=method, rules=(*rules, rest), ignore=(_HEAD,))
    if layout == "awq":
        if others:
            raise ConfigError("AWQ has one scheme for all linears", hint="use layout: pack-quantized")
        return QuantConfig(method="awq", rules=(rest,), ignore=tuple(f"in:{m}" for m in (_HEAD, *dense)))
    rules = [Rule(targets=tuple(modules), scheme=scheme) for scheme, modules in others.items()]
    return QuantConfig(method=method, rules=(*rules, rest), ignore=(_HEAD, *dense))
