"""Reads a linear layer from its tensors and writes it, by its scheme; the two undo each other exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sailfish.base.errors import CheckpointError, ConfigError
from sailfish.checkpoint.files import shown
from sailfish.checkpoint.formats.awq import read_awq, rejects_awq, write_awq
from sailfish.checkpoint.formats.compressed_tensors import (
    read_compressed,
    rejects_compressed,
    write_compressed,
)
from sailfish.checkpoint.formats.gptq import read_gptq, rejects_gptq, write_gptq
from sailfish.checkpoint.formats.linear import QuantisedLinear, check_linear
from sailfish.checkpoint.formats.parts import Parts
from sailfish.checkpoint.formats.scheme import LinearScheme, QuantConfig
from sailfish.checkpoint.formats.tensors import StoredTensor
from sailfish.checkpoint.safetensors_reader import Checkpoint

_MARKS = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv", "qzeros")
"""A module with one of these is quantised, whatever the config says."""


def read_linear(
    tensors: Mapping[str, StoredTensor],
    scheme: LinearScheme,
    where: str,
    shape: tuple[int, int] | None = None,
) -> QuantisedLinear:
    """Return the layer that its tensors hold, named without the module ("qweight", ...); no bias among them.

    CheckpointError where sizes do not fit each other, the scheme, or `shape` (outputs, inputs).
    """
    parts = Parts(tensors, where)
    if scheme.layout in ("gptq", "gptq_v2"):
        linear = read_gptq(parts, scheme)
    elif scheme.layout == "awq":
        linear = read_awq(parts, scheme)
    else:
        linear = read_compressed(parts, scheme)
    parts.finish()
    if shape is not None and linear.shape != shape:
        raise CheckpointError(
            f"{where} holds {linear.shape[0]} outputs and {linear.shape[1]} inputs, the model has {shape}"
        )
    return check_linear(linear, where)


def write_linear(linear: QuantisedLinear, scheme: LinearScheme, where: str) -> Mapping[str, StoredTensor]:
    """Return the layer's tensors by name, exactly; ConfigError in words where the scheme cannot hold it."""
    reason = rejects(linear, scheme)
    if reason is not None:
        raise ConfigError(f"{where} cannot be stored as {scheme.layout}: {reason}")
    if scheme.layout in ("gptq", "gptq_v2"):
        return write_gptq(linear, scheme)
    return write_awq(linear) if scheme.layout == "awq" else write_compressed(linear, scheme)


def rejects(linear: QuantisedLinear, scheme: LinearScheme) -> str | None:
    """Return why a scheme cannot hold a layer exactly, None if it can."""
    n_in = linear.shape[1]
    group = n_in if scheme.group is None else scheme.group
    if linear.is_float is not scheme.is_float:
        return "float8 numbers and whole numbers do not convert exactly"
    if linear.bits != scheme.bits:
        return f"it has {linear.bits} bits and the scheme {scheme.bits}"
    if min(linear.group, n_in) != min(group, n_in):
        return f"it has groups of {linear.group} inputs and the scheme of {group}"
    if linear.g_idx is not None and not scheme.act_order:
        return "its inputs are ordered by act-order and the scheme has none"
    if scheme.activations is not None and scheme.layout in ("gptq", "gptq_v2", "awq"):
        return "it rounds its inputs to 8 bits, which the format has no key for"
    is_static = scheme.activations is not None and not scheme.activations.dynamic
    if is_static is not (linear.input_scale is not None):
        return "only one of it and the scheme has a static scale of the inputs"
    if scheme.symmetric and linear.zero_OG is not None:
        return "it has zero points and the scheme is symmetric"
    if scheme.layout in ("gptq", "gptq_v2"):
        return rejects_gptq(linear)
    return rejects_awq(linear) if scheme.layout == "awq" else rejects_compressed(linear, scheme)


def schemes_of(
    config: QuantConfig, modules: Iterable[str], tensor_names: Iterable[str]
) -> dict[str, LinearScheme | None]:
    """Return how each of a model's linears is stored, None if dense, where config and tensors agree.

    `modules` are the linears' names as the checkpoint spells them. CheckpointError names the first linear
    that the config calls quantised and the tensors dense, or the other way round.
    """
    parts_of = _parts_by_module(tensor_names)
    found: dict[str, LinearScheme | None] = {}
    for module in modules:
        parts, scheme = parts_of.get(module, set()), config.scheme_of(module)
        mark = next((mark for mark in _MARKS if mark in parts), None)
        if scheme is None and mark is not None:
            raise CheckpointError(f"{module} has {mark}, but quantization_config leaves it dense")
        if scheme is not None and mark is None and "weight" in parts:
            if config.method == "compressed-tensors":
                raise CheckpointError(f"{module} is dense, but quantization_config names it as quantised")
            scheme = None  # GPTQ and AWQ have no list of what they quantise: the tensors say it
        found[module] = scheme
    return found


def quantised_modules(tensor_names: Iterable[str]) -> list[str]:
    """Return the names of the modules that hold quantised tensors, sorted."""
    return sorted(
        module for module, parts in _parts_by_module(tensor_names).items() if not parts.isdisjoint(_MARKS)
    )


def layer_tensors(checkpoint: Checkpoint, module: str) -> dict[str, StoredTensor]:
    """Return a quantised module's tensors as `read_linear` takes them: without its name and its bias."""
    prefix = f"{module}."
    names = [
        name
        for name in checkpoint.tensors
        if name.startswith(prefix) and "." not in name[len(prefix) :] and name != f"{prefix}bias"
    ]
    if not names:
        raise CheckpointError(f"{checkpoint.directory} holds no tensor of {shown(module)}")
    return {name[len(prefix) :]: StoredTensor.from_checkpoint(checkpoint, name) for name in names}


def _parts_by_module(tensor_names: Iterable[str]) -> dict[str, set[str]]:
    parts: dict[str, set[str]] = {}
    for name in tensor_names:
        module, _, part = name.rpartition(".")
        parts.setdefault(module, set()).add(part)
    return parts
