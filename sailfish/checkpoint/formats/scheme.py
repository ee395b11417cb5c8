"""How the linear layers of a quantised checkpoint are stored, whatever tool wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sailfish.checkpoint.formats.patterns import matches, rank

Layout = Literal["gptq", "gptq_v2", "awq", "pack-quantized", "int-quantized", "float-quantized"]
Strategy = Literal["tensor", "channel", "group"]
Method = Literal["gptq", "awq", "compressed-tensors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationScheme:
    """How the input of a linear, or the KV cache, is rounded to 8 bits while the model runs."""

    kind: Literal["int", "float"]
    dynamic: bool
    """Scales are found while it runs, else they lie beside the weights (input_scale; k_scale, v_scale)."""
    strategy: Literal["tensor", "token"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScheme:
    """How one linear is stored."""

    layout: Layout
    bits: int
    strategy: Strategy
    """What shares a scale: the whole weight, a row (one output), or a group of a row's inputs."""
    group: int | None = None
    """Inputs that share a scale where strategy is "group"."""
    symmetric: bool = True
    """No zero points: the middle code means zero."""
    act_order: bool = False
    """The inputs of a group may lie apart; a g_idx names the group of each."""
    activations: ActivationScheme | None = None
    """None: inputs stay as they are."""

    @property
    def is_float(self) -> bool:
        """Codes are float8 numbers, not whole ones."""
        return self.layout == "float-quantized"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """The scheme of the linears that a list of patterns names."""

    targets: tuple[str, ...]
    """Module names, "re:" and a regular expression, or the class "Linear"."""
    scheme: LinearScheme | None
    """None: they are not quantised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig:
    """What `quantization_config` of config.json says."""

    method: Method
    rules: tuple[Rule, ...]
    """Of the rules that match, an exact name goes before an expression, and that before a class."""
    ignore: tuple[str, ...] = ()
    """Patterns of linears that stay dense; "in:" and a text means every name that holds the text."""
    kv_cache: ActivationScheme | None = None

    def scheme_of(self, module: str) -> LinearScheme | None:
        """Return how the linear of this name is stored, None if dense."""
        if any(matches(module, pattern) for pattern in self.ignore):
            return None
        found = [
            (rank(pattern), number)
            for number, rule in enumerate(self.rules)
            for pattern in rule.targets
            if matches(module, pattern)
        ]
        return self.rules[min(found)[1]].scheme if found else None
