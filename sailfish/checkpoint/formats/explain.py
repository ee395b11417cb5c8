"""Explains the quantised linears of a checkpoint one by one, with what in them deserves a second look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from sailfish.checkpoint.formats.codec import layer_tensors, quantised_modules, read_linear
from sailfish.checkpoint.formats.config import load_quant_config
from sailfish.checkpoint.formats.linear import QuantisedLinear
from sailfish.checkpoint.formats.scheme import LinearScheme, QuantConfig
from sailfish.checkpoint.formats.stored import keeps, scheme_words
from sailfish.checkpoint.formats.tensors import StoredTensor
from sailfish.checkpoint.formats.words import unpack
from sailfish.checkpoint.model_config import StoredWeights
from sailfish.checkpoint.safetensors_reader import Checkpoint

_MANY = 0.05
"""A share of codes at an end of their range that is worth a word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFacts:
    """One quantised linear."""

    name: str
    layout: str
    words: str
    """Its scheme, as in "4 bits in groups of 128"."""
    shape: tuple[int, int]
    """Outputs and inputs."""
    tensors: Mapping[str, str]
    """Part -> dtype and shape, as in "I32 [32, 768]"."""
    n_bytes: int
    scale_range: tuple[float, float]
    """The smallest and the largest."""
    kept: bool
    """An engine multiplies it as it is stored, if those that share its product are stored alike."""
    warnings: tuple[str, ...]

    @property
    def bits(self) -> float:
        """Stored bits for each weight, scales and zero points included."""
        return 8 * self.n_bytes / prod(self.shape)


def explain_linears(checkpoint: Checkpoint) -> Iterator[LinearFacts]:
    """Read every quantised linear and yield what it is; raises as its readers do."""
    config = _config(checkpoint)
    for module in quantised_modules(checkpoint.tensors):
        scheme = config.scheme_of(module)
        if scheme is not None:
            yield _facts(checkpoint, module, scheme)


def format_warnings(checkpoint: Checkpoint, stored: StoredWeights) -> list[str]:
    """Return what a reader of the checkpoint should know, from its config and headers alone."""
    config = _config(checkpoint)
    schemes = {rule.scheme for rule in config.rules if rule.scheme is not None}
    found = []
    if any(scheme.layout == "gptq" for scheme in schemes):
        found.append("zero points are stored less one (gptq); a reader of gptq_v2 would be off by one")
    if stored.restored is not None:
        found.append(f"an engine restores some weights to its dtype: {stored.restored}")
    if config.kv_cache is not None:
        found.append("scales of an 8-bit KV cache are not used: --kv-dtype makes a cache with its own")
    parts = (".scales", ".weight_scale")
    halves = [name for name, ref in checkpoint.tensors.items() if name.endswith(parts) and ref.dtype == "F16"]
    if halves:
        found.append("scales are float16: an engine in bfloat16 rounds them, by 1 part in 512 at most")
    return found


def _config(checkpoint: Checkpoint) -> QuantConfig:
    config = load_quant_config(checkpoint.directory)
    assert config is not None, "only quantised checkpoints are explained"
    return config


def _facts(checkpoint: Checkpoint, module: str, scheme: LinearScheme) -> LinearFacts:
    tensors = layer_tensors(checkpoint, module)
    linear = read_linear(tensors, scheme, module)
    return LinearFacts(
        name=module,
        layout=scheme.layout,
        words=scheme_words(scheme),
        shape=linear.shape,
        tensors={part: f"{tensor.dtype} {list(tensor.array.shape)}" for part, tensor in tensors.items()},
        n_bytes=sum(tensor.array.nbytes for tensor in tensors.values()),
        scale_range=(float(linear.scale_OG.min()), float(linear.scale_OG.max())),
        kept=keeps(scheme) is None,
        warnings=tuple(_warnings(linear, tensors, scheme)),
    )


def _warnings(
    linear: QuantisedLinear, tensors: Mapping[str, StoredTensor], scheme: LinearScheme
) -> Iterator[str]:
    if scheme.act_order and linear.order is None:
        yield "act-order is set, but its inputs are in order"
    if linear.g_idx is not None and not scheme.act_order:
        yield "its inputs are in act-order, which the config does not say"
    if linear.zero_OG is not None and scheme.symmetric:
        yield "it has zero points, though the config says symmetric"
    if scheme.layout == "gptq" and scheme.symmetric and _is_mislabelled(linear, tensors):
        yield "its zero points are stored as in gptq_v2, though the config says gptq; they are read as such"
    n_zero = int((linear.scale_OG == 0).sum())
    if n_zero:
        yield f"{n_zero} scales are 0: their weights are all 0"
    if linear.is_float:
        return
    top = (1 << linear.bits) - 1
    ends = np.count_nonzero((linear.code_OI == 0) | (linear.code_OI == top)) / linear.code_OI.size
    if linear.bits >= 4 and ends > (2**-linear.bits) * 2 + _MANY:
        yield f"{ends:.0%} of its codes are at an end of their range: weights may be cut off"


def _is_mislabelled(linear: QuantisedLinear, tensors: Mapping[str, StoredTensor]) -> bool:
    """Say whether each zero point, read as gptq_v2 has them, is the middle."""
    stored = unpack(tensors["qzeros"].array, linear.bits, linear.shape[0])
    return bool((stored == 1 << (linear.bits - 1)).all())
