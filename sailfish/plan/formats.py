"""Which numbers each weight is stored in, and the tensors of the arena that this makes. No torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import prod

from sailfish.base.config import EngineConfig
from sailfish.base.errors import ConfigError
from sailfish.checkpoint.model_config import ModelConfig, StoredWeights
from sailfish.checkpoint.names import LAYER_WEIGHT, TensorSpec, tensor_specs
from sailfish.plan.types import Decision, Dtype, WeightFormat, WeightFormats

STORED_BYTES: dict[str, int] = {"I32": 4, "F32": 4, "BF16": 2, "F16": 2, "I8": 1, "F8_E4M3": 1}
"""Bytes of one element, by the name that safetensors has for its dtype."""
_SPELLED: dict[Dtype, str] = {"float32": "F32", "bfloat16": "BF16"}
GROUPS = (32, 64, 128)
"""Inputs that may share a scale in 4 bits."""
PLAIN: tuple[Dtype, ...] = ("bfloat16", "float32")
"""What `weights` may be besides 4 and 8 bits: a plain dtype, which the activations then have too."""
_IN_FORMAT: dict[str, tuple[str, ...]] = {
    "weights": (*PLAIN, "int4", "int8", "fp8"),
    "head": ("plain", "int4", "int8", "fp8"),
    "embedding": ("plain", "int8"),
    "weight_group": tuple(map(str, GROUPS)),
}
_EMBED, _HEAD = "embed.weight", "head.weight"
_STRIP, _UNIT, _ROWS = 16, 64, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaTensor:
    """One tensor as it lies in memory: a whole weight, or a part of a quantised one."""

    name: str
    """Of the weight; a part has its own name after it, as in "layers.0.qkv.weight.scale"."""
    shape: tuple[int, ...]
    dtype: str | None
    """As safetensors spells it; None: the plan's dtype."""
    run: int = 0
    """Rows of the first half of what is read, then of the second, that follow each other; 0: all do."""

    def n_bytes(self, dtype: Dtype) -> int:
        """Return its size where the plan's dtype is `dtype`."""
        return prod(self.shape) * STORED_BYTES[self.dtype or _SPELLED[dtype]]


def formats_of(config: EngineConfig, model: ModelConfig) -> WeightFormats:
    """Return the formats that are asked for; raises ConfigError for one that does not exist."""
    for name, allowed in _IN_FORMAT.items():
        value = getattr(config, name)
        if value is not None and str(value) not in allowed:
            raise ConfigError(
                f"{name} {value!r} is not supported", hint=f"use one of {', '.join(allowed)}", param=name
            )
    layers = _format(None if config.weights in PLAIN else config.weights)
    embedding = _format(config.embedding)
    head = _format(config.head if config.head is not None or not model.tied_head else config.embedding)
    if model.stored is not None and config.weights not in PLAIN and model.stored.format != "plain":
        return _stored_formats(config, model.stored, head, embedding)
    group = WeightFormats().group if config.weight_group is None else config.weight_group
    return WeightFormats(layers=layers, head=head, embedding=embedding, group=group)


def _stored_formats(
    config: EngineConfig, stored: StoredWeights, head: WeightFormat, embedding: WeightFormat
) -> WeightFormats:
    """Return the checkpoint's own formats; what else is asked for must not contradict them."""
    is_int4 = "int4" in (stored.format, *(format for _, format in stored.others))
    asked = {"weights": config.weights, "weight_group": config.weight_group}
    for name, there in (("weights", stored.format), ("weight_group", stored.group if is_int4 else None)):
        if asked[name] not in (None, there) and not (there is None and head == "int4"):
            raise ConfigError(
                f"{name} {asked[name]!r} is not what the checkpoint stores: {stored.words}",
                hint=f"leave {name} to auto, or quantise the unquantised checkpoint",
                param=name,
            )
    group = stored.group if is_int4 or config.weight_group is None else config.weight_group
    return WeightFormats(
        layers=stored.format,
        head=head,
        embedding=embedding,
        group=group,
        stored=True,
        zero_points=stored.zero_points,
        others=stored.others,
        ordered=stored.ordered,
        static=stored.static,
    )


def laid_out(formats: WeightFormats, target: str) -> WeightFormats:
    """Return the formats with 4-bit weights as the target's kernels read them."""
    return replace(formats, layout="lanes") if target == "cpu" and _has_int4(formats) else formats


def is_quantised(formats: WeightFormats) -> bool:
    """Say whether any weight is in 4 or 8 bits."""
    return (formats.layers, formats.head, formats.embedding) != ("plain", "plain", "plain")


def config_of(formats: WeightFormats) -> EngineConfig:
    """Return the settings that ask for nothing but these formats."""
    return EngineConfig(
        weights=None if formats.layers == "plain" else formats.layers,
        head=None if formats.head == "plain" else formats.head,
        embedding=None if formats.embedding == "plain" else formats.embedding,
        weight_group=formats.group if _has_int4(formats) else None,
    )


def words(formats: WeightFormats) -> str:
    """Return the formats in words, as in "int4 (groups of 128), int8 head"."""
    parts = [_word(formats.layers, formats)] if formats.layers != "plain" else []
    parts += ["stored"] if formats.stored else []
    parts += ["static scales of inputs"] if formats.static else []
    others = Counter(format for _, format in formats.others)
    parts += [f"{n} of the layers' weights {format}" for format, n in sorted(others.items())]
    parts += [f"{_word(formats.head, formats)} head"] if formats.head != "plain" else []
    parts += [f"{formats.embedding} embedding"] if formats.embedding != "plain" else []
    return ", ".join(parts) or "plain"


def decisions(
    config: EngineConfig, model: ModelConfig, formats: WeightFormats, dtype: Dtype
) -> list[Decision]:
    """Return what was asked of the weights' formats, what is active and why."""

    def decide(name: str, value: str | int | None, active: str, default: str) -> Decision:
        why = default if value is None else "as asked"
        return Decision(name=name, requested="auto" if value is None else str(value), active=active, why=why)

    plain_layers = formats.layers == "plain"
    stored = model.stored
    why_weights = "as dtype"
    if stored is not None:
        how = "restored from the checkpoint's" if plain_layers else "as the checkpoint stores them"
        why_weights = f"{how}: {stored.words}"
    active = dtype if plain_layers else _word(formats.layers, formats)
    found = [
        decide("weights", config.weights, active, why_weights),
        decide("head", config.head, _active(formats.head, dtype), _why_head(model, formats)),
        decide(
            "embedding",
            config.embedding,
            _active(formats.embedding, dtype),
            "a step reads a row for each token and no more, so 8 bits save memory, not time",
        ),
    ]
    group, why = str(formats.group), "the usual one, a scale for 64 bytes"
    if not _has_int4(formats):
        group, why = "none", "no weight is in 4 bits"
    found.append(decide("weight_group", config.weight_group, group, why))
    if formats.ordered:
        why = "the checkpoint has their inputs in another order (act-order): each product gathers them first"
        n_ordered = f"{len(formats.ordered)} of the layers' weights"
        found.append(Decision(name="act_order", requested="auto", active=n_ordered, why=why))
    if stored is not None and stored.restored is not None and config.weights not in PLAIN:
        n_plain = sum(format == "plain" for _, format in formats.others)
        many = "all" if plain_layers else f"{n_plain} of the layers'" if n_plain else "others"
        why = f"{stored.restored} ({stored.words})"
        found.append(
            Decision(
                name="restored_weights",
                requested="auto",
                active=f"{many} in {dtype}",
                why=why,
                is_downgrade=True,
            )
        )
    n_routed = sum(layer.moe is not None for layer in model.layers)
    if n_routed and not plain_layers:
        why = f"no kernel reads {formats.layers} experts; the {n_routed} layers' experts keep their dtype"
        found.append(Decision(name="experts", requested=formats.layers, active=dtype, why=why))
    return found


def engine_specs(model: ModelConfig, formats: WeightFormats) -> list[tuple[TensorSpec, WeightFormat]]:
    """Return every weight of the engine with its format, in the order the forward pass meets them.

    A head that is tied to an embedding of another format becomes a weight of its own.
    """
    specs = tensor_specs(model)
    if model.tied_head and formats.head != formats.embedding:
        embed = next(spec for spec in specs if spec.name == _EMBED)
        specs.append(replace(embed, name=_HEAD))
    return [(spec, format_of(spec.name, formats)) for spec in specs]


def format_of(name: str, formats: WeightFormats) -> WeightFormat:
    """Return the format of a weight; norms, biases, routers and experts are always plain."""
    if name == _EMBED:
        return formats.embedding
    if name == _HEAD:
        return formats.head
    if not LAYER_WEIGHT.fullmatch(name):
        return "plain"
    return next((format for other, format in formats.others if other == name), formats.layers)


def kind_of(name: str) -> str:
    """Return what a weight is, whatever layer it is in: "qkv", "experts.down", "norms" and so on."""
    parts = name.split(".")[2:] if name.startswith("layers.") else name.split(".")
    if parts[-1] == "bias":
        return "biases"
    return "norms" if parts[-2].endswith("norm") else ".".join(parts[:-1])


def arena_tensors(model: ModelConfig, formats: WeightFormats) -> list[ArenaTensor]:
    """Return every tensor of the arena in order."""
    return [
        tensor for spec, format in engine_specs(model, formats) for tensor in parts(spec, format, formats)
    ]


def parts(spec: TensorSpec, format: WeightFormat, formats: WeightFormats) -> list[ArenaTensor]:
    """Return the tensors that hold one weight. Those of a quantised one are stored as they lie in memory."""
    name, shape = spec.name, spec.shape
    if format == "plain":
        return [ArenaTensor(name=name, shape=shape, dtype=None, run=spec.run)]
    n_out, n_in = shape
    if format == "int4":
        rows, width, group = int4_sizes(n_out, n_in, formats.group)
        packed = (rows // _STRIP, width // _UNIT, 32, 4)
        scale = (rows // _STRIP, width // group, _STRIP)
        is_stored = formats.stored and name != _HEAD
        found = [
            ArenaTensor(name=f"{name}.packed", shape=packed, dtype="I32"),
            ArenaTensor(name=f"{name}.scale", shape=scale, dtype=None if is_stored else "BF16"),
        ]
        if is_stored and formats.zero_points:
            found.append(ArenaTensor(name=f"{name}.zero", shape=scale, dtype=None))
        if name in formats.ordered:
            found.append(ArenaTensor(name=f"{name}.order", shape=(n_in,), dtype="I32"))
        return found
    values = "I8" if format == "int8" else "F8_E4M3"
    found = [
        ArenaTensor(name=f"{name}.values", shape=shape, dtype=values),
        ArenaTensor(name=f"{name}.scale", shape=(n_out,), dtype="F32"),
    ]
    if name in formats.static:
        found.append(ArenaTensor(name=f"{name}.input_scale", shape=(1,), dtype="F32"))
    return found


def int4_sizes(n_out: int, n_in: int, group: int) -> tuple[int, int, int]:
    """Return outputs and inputs with their padding, and the group: all of a row where one holds it."""
    rows, width = _up(n_out, _ROWS), _up(n_in, _UNIT)
    if n_in <= group:
        return rows, width, width
    return rows, _up(width, group), group


def _has_int4(formats: WeightFormats) -> bool:
    return "int4" in (formats.layers, formats.head, *(format for _, format in formats.others))


def _format(asked: str | None) -> WeightFormat:
    formats: dict[str | None, WeightFormat] = {"int4": "int4", "int8": "int8", "fp8": "fp8"}
    return formats.get(asked, "plain")


def _word(format: str, formats: WeightFormats) -> str:
    return f"int4 (groups of {formats.group})" if format == "int4" else format


def _active(format: str, dtype: Dtype) -> str:
    return dtype if format == "plain" else format


def _why_head(model: ModelConfig, formats: WeightFormats) -> str:
    if model.tied_head:
        return "as the embedding, whose weight it shares"
    return "its errors reach every token's choice"


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
