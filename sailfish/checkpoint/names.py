"""Name every tensor of an engine and the checkpoint tensors whose rows make it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sailfish.base.errors import CheckpointError, UnsupportedModelError
from sailfish.checkpoint.files import shown
from sailfish.checkpoint.formats.codec import quantised_modules
from sailfish.checkpoint.model_config import LayerConfig, ModelConfig, MoeConfig
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.kernels.contract import gated_run

FLOAT_DTYPES = ("F32", "BF16", "F16")

# Buffers that old versions of transformers saved; they are computed from the config.
_HARMLESS = re.compile(r"(\.rotary_emb\.inv_freq|\.masked_bias|\.attn\.bias)$")
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|weight_packed|weight_scale|weight_zero_point|absmax)(\.|$|_)"
)
_CACHE_SCALE = re.compile(r"\.([kvq]_scale|[kvq]_proj\.output_scale)$")
"""Of an 8-bit KV cache; a cache here has scales of its own."""
LAYER_WEIGHT = re.compile(r"layers\.\d+\.(qkv|o|gate_up|down)\.weight")
"""The engine's names of the linears that `weights` sets the format of."""
_EMBED, _HEAD, _FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

Shape = tuple[int, ...]
Source = tuple[str, Shape]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of an engine: the rows of its sources, one after the other along the first axis."""

    name: str
    shape: Shape
    sources: tuple[str, ...]
    """Checkpoint tensors in order. For experts, [X, rows, cols] is read as [X * rows, cols]."""
    source_shapes: tuple[Shape, ...]
    """The shape each source must have."""
    run: int
    """Rows of the first half of its sources, then of the second, that follow each other; 0: the halves do."""


def tensor_specs(config: ModelConfig) -> list[TensorSpec]:
    """Return every tensor of the engine in the order the forward pass meets them."""
    d_model = config.d_model
    specs = [_spec("embed.weight", (config.vocab_size, d_model), (_EMBED, (config.vocab_size, d_model)))]
    for i, layer in enumerate(config.layers):
        specs += _layer_specs(config, layer, f"layers.{i}", f"model.layers.{i}")
    specs.append(_spec("final_norm.weight", (d_model,), (_FINAL_NORM, (d_model,))))
    if not config.tied_head:
        specs.append(
            _spec("head.weight", (config.vocab_size, d_model), (_HEAD, (config.vocab_size, d_model)))
        )
    return specs


def linear_modules(spec: TensorSpec) -> list[str]:
    """Return the checkpoint's names of the linears whose rows a tensor is made of; none but of linears."""
    if spec.name == "embed.weight" or len(spec.shape) < 2:
        return []
    return [source.removesuffix(".weight") for source in spec.sources]


def check_tensors(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raise naming the first tensor that is missing, misshapen, of another type, or that would be ignored."""
    specs = tensor_specs(config)
    # What a quantised linear's tensors must be its reader says.
    quantised = _quantised_weights(specs, checkpoint) if config.stored is not None else set()
    owners = {weight.removesuffix(".weight") for weight in quantised}
    expected = {name for name in checkpoint.tensors if name.rpartition(".")[0] in owners}
    expected -= {f"{owner}.bias" for owner in owners}
    for spec in specs:
        for source, shape in zip(spec.sources, spec.source_shapes, strict=True):
            if source not in quantised:
                expected.add(source)
                _check_source(checkpoint, source, shape)
    for name in sorted(checkpoint.tensors.keys() - expected):
        if _HARMLESS.search(name) or (name == _HEAD and config.tied_head):
            continue
        if config.stored is not None and _CACHE_SCALE.search(name):
            continue
        where = f"{checkpoint.directory / checkpoint.tensors[name].file}: tensor {shown(name)}"
        if _QUANTISED.search(name):
            raise UnsupportedModelError(f"{where} is quantised", hint="use the unquantised checkpoint")
        raise UnsupportedModelError(
            f"{where} has no place in a {config.family} model of {config.n_layers} layers; "
            "ignoring it would change the output",
            hint="check config.json, or remove the tensor",
        )


def _quantised_weights(specs: list[TensorSpec], checkpoint: Checkpoint) -> set[str]:
    """Return the sources that a quantised checkpoint holds in parts, or in whole numbers."""
    modules = set(quantised_modules(checkpoint.tensors))
    return {f"{module}.weight" for spec in specs for module in linear_modules(spec) if module in modules}


def _check_source(checkpoint: Checkpoint, source: str, shape: Shape) -> None:
    ref = checkpoint.tensors.get(source)
    if ref is None:
        packed = [
            n
            for n in checkpoint.tensors
            if n.startswith(source.removesuffix("weight")) and _QUANTISED.search(n)
        ]
        if packed:
            raise UnsupportedModelError(
                f"{checkpoint.directory}: tensor {source} is stored quantised as {shown(packed[0])}",
                hint="use the unquantised checkpoint",
            )
        raise CheckpointError(
            f"{checkpoint.directory} lacks tensor {source} of shape {list(shape)}", hint="check config.json"
        )
    if ref.shape != shape:
        raise CheckpointError(
            f"{checkpoint.directory / ref.file}: tensor {source} has shape {list(ref.shape)}, "
            f"config.json asks for {list(shape)}"
        )
    if ref.dtype not in FLOAT_DTYPES:
        raise UnsupportedModelError(
            f"{checkpoint.directory / ref.file}: tensor {source} has dtype {ref.dtype}; supported are "
            f"{', '.join(FLOAT_DTYPES)}",
            hint="use the unquantised checkpoint",
        )


def _spec(name: str, shape: Shape, *sources: Source, run: int = 0) -> TensorSpec:
    names, shapes = zip(*sources, strict=True)
    return TensorSpec(name=name, shape=shape, sources=names, source_shapes=shapes, run=run)


def _layer_specs(config: ModelConfig, layer: LayerConfig, ours: str, theirs: str) -> Iterator[TensorSpec]:
    d_model = config.d_model

    def norm(name: str, source: str) -> TensorSpec:
        return _spec(f"{ours}.{name}.weight", (d_model,), (f"{theirs}.{source}.weight", (d_model,)))

    names = _norm_names(config)
    yield norm("attn_norm", "input_layernorm")
    yield from _attention_specs(config, ours, f"{theirs}.self_attn")
    if config.sandwich_norms:
        yield norm("attn_post_norm", names[0])
    yield norm("mlp_norm", names[1])
    if layer.moe:
        yield from _expert_specs(config, layer.moe, ours, theirs)
    else:
        yield from _mlp_specs(config, ours, f"{theirs}.mlp")
    if config.sandwich_norms:
        yield norm("mlp_post_norm", names[2])


def _norm_names(config: ModelConfig) -> tuple[str, str, str]:
    """What the norms after attention, before the MLP and after it are called."""
    if config.family == "glm4":
        return "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"
    if config.sandwich_norms:
        return "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    return "", "post_attention_layernorm", ""


def _attention_specs(config: ModelConfig, ours: str, theirs: str) -> Iterator[TensorSpec]:
    d_model, d_q, d_kv = config.d_model, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    rows = {"q_proj": d_q, "k_proj": d_kv, "v_proj": d_kv}
    yield _spec(
        f"{ours}.qkv.weight", (d_q + 2 * d_kv, d_model),
        *((f"{theirs}.{part}.weight", (n, d_model)) for part, n in rows.items()),
    )  # fmt: skip
    if config.qkv_bias:
        sources = ((f"{theirs}.{part}.bias", (n,)) for part, n in rows.items())
        yield _spec(f"{ours}.qkv.bias", (d_q + 2 * d_kv,), *sources)
    if config.qk_norm:
        for part in ("q_norm", "k_norm"):
            yield _spec(
                f"{ours}.{part}.weight", (config.head_dim,), (f"{theirs}.{part}.weight", (config.head_dim,))
            )
    yield _spec(f"{ours}.o.weight", (d_model, d_q), (f"{theirs}.o_proj.weight", (d_model, d_q)))
    if config.o_bias:
        yield _spec(f"{ours}.o.bias", (d_model,), (f"{theirs}.o_proj.bias", (d_model,)))


def _mlp_specs(config: ModelConfig, ours: str, theirs: str) -> Iterator[TensorSpec]:
    d_model, d_mlp = config.d_model, config.d_mlp
    run = gated_run(d_mlp) % d_mlp
    fused = config.family == "glm4"
    parts = {"gate_up_proj": 2 * d_mlp} if fused else {"gate_proj": d_mlp, "up_proj": d_mlp}
    yield _spec(
        f"{ours}.gate_up.weight", (2 * d_mlp, d_model),
        *((f"{theirs}.{part}.weight", (n, d_model)) for part, n in parts.items()), run=run,
    )  # fmt: skip
    if config.mlp_bias:
        sources = ((f"{theirs}.{part}.bias", (n,)) for part, n in parts.items())
        yield _spec(f"{ours}.gate_up.bias", (2 * d_mlp,), *sources, run=run)
    yield _spec(f"{ours}.down.weight", (d_model, d_mlp), (f"{theirs}.down_proj.weight", (d_model, d_mlp)))
    if config.mlp_bias:
        yield _spec(f"{ours}.down.bias", (d_model,), (f"{theirs}.down_proj.bias", (d_model,)))


def _expert_specs(config: ModelConfig, moe: MoeConfig, ours: str, theirs: str) -> Iterator[TensorSpec]:
    block, gate, up, down = (
        ("block_sparse_moe", "w1", "w3", "w2")
        if config.family == "mixtral"
        else ("mlp", "gate_proj", "up_proj", "down_proj")
    )
    d_model, d_mlp, n_experts = config.d_model, moe.d_mlp, moe.n_experts
    experts = [f"{theirs}.{block}.experts.{x}" for x in range(n_experts)]
    yield _spec(
        f"{ours}.router.weight", (n_experts, d_model), (f"{theirs}.{block}.gate.weight", (n_experts, d_model))
    )
    yield _spec(
        f"{ours}.experts.gate_up.weight", (n_experts, 2 * d_mlp, d_model),
        *((f"{expert}.{part}.weight", (d_mlp, d_model)) for expert in experts for part in (gate, up)),
    )  # fmt: skip
    yield _spec(
        f"{ours}.experts.down.weight", (n_experts, d_model, d_mlp),
        *((f"{expert}.{down}.weight", (d_model, d_mlp)) for expert in experts),
    )  # fmt: skip
