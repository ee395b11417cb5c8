"""Turn config.json and generation_config.json into a ModelConfig."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from sailfish.base.errors import CheckpointError, UnsupportedModelError
from sailfish.checkpoint.families import FAMILIES, Family
from sailfish.checkpoint.files import Keys, read_json, shown
from sailfish.checkpoint.formats.config import load_quant_config
from sailfish.checkpoint.formats.stored import stored_weights
from sailfish.checkpoint.model_config import (
    GenerationDefaults,
    LayerConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
)
from sailfish.checkpoint.rope import LAYER_TYPES, MAX_LAYERS, context_tokens, rope_config
from sailfish.checkpoint.safetensors_reader import Checkpoint

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_WIDTH = 2**18
MAX_VOCAB = 2**22
MAX_EXPERTS = 4096

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]
_DTYPES: dict[str, Dtype] = {
    "float32": "float32", "bfloat16": "bfloat16", "float16": "float16",
    "F32": "float32", "BF16": "bfloat16", "F16": "float16",
}  # fmt: skip
_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def load_model_config(directory: Path | str) -> ModelConfig:
    """Read a checkpoint directory's config.json, or raise naming the key, its value and what is supported."""
    directory = Path(directory)
    config = Keys(read_json(directory / CONFIG_FILE, MAX_CONFIG_BYTES), str(directory / CONFIG_FILE))
    model_type, row = _family(config)
    _, eos_token_ids, bos_token_id = load_generation_defaults(directory)
    n_heads = config.integer("num_attention_heads", 1, MAX_HEADS)
    n_kv_heads = config.integer_or("num_key_value_heads", 1, MAX_HEADS, n_heads)
    if n_heads % n_kv_heads:
        raise CheckpointError(
            f"{config.where}: num_attention_heads {n_heads} is not a multiple of "
            f"num_key_value_heads {n_kv_heads}"
        )
    d_model = config.integer("hidden_size", 1, MAX_WIDTH)
    head_dim = _head_dim(config, row, d_model, n_heads)
    vocab_size = config.integer("vocab_size", 1, MAX_VOCAB)
    layers = _layers(config, row, head_dim)
    bias = config.flag("attention_bias", row.bias_default) if row.bias == "attention_bias" else False
    model = ModelConfig(
        family=model_type,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_mlp=config.integer("intermediate_size", 1, MAX_WIDTH),
        vocab_size=vocab_size,
        context_tokens=context_tokens(config, (layer.rope for layer in layers)),
        norm_eps=config.number_or("rms_norm_eps", 1e-12, 1.0, row.norm_eps),
        layers=layers,
        dtype=_dtype(config, directory),
        activation=_activation(config, row),
        tied_head=config.flag("tie_word_embeddings", row.is_gemma),
        qkv_bias=row.bias == "qkv" or bias,
        o_bias=bias and row.bias_on_output,
        mlp_bias=row.mlp_bias and config.flag("mlp_bias"),
        qk_norm=row.qk_norm,
        norm_plus_one=row.is_gemma,
        sandwich_norms=row.sandwich_norms,
        embed_scale=d_model**0.5 if row.is_gemma else 1.0,
        attention_scale=config.number_or("query_pre_attn_scalar", 1e-6, 1e9, 256.0) ** -0.5
        if row.is_gemma
        else None,
        attention_softcap=_softcap(config, "attn_logit_softcapping", row.attention_softcap)
        if row.is_gemma
        else None,
        logit_softcap=_softcap(config, "final_logit_softcapping", row.logit_softcap)
        if row.is_gemma
        else None,
        # An id outside the vocabulary can never be drawn.
        eos_token_ids=tuple(token_id for token_id in eos_token_ids if token_id < vocab_size),
        bos_token_id=bos_token_id,
    )
    quantisation = load_quant_config(directory)
    if quantisation is None:
        return model
    return replace(model, stored=stored_weights(model, quantisation, Checkpoint.open(directory)))


def load_generation_defaults(directory: Path | str) -> tuple[GenerationDefaults, tuple[int, ...], int | None]:
    """Return sampling defaults, end-of-text ids and the begin id.

    generation_config.json goes before config.json.
    """
    directory = Path(directory)
    config = Keys(read_json(directory / CONFIG_FILE, MAX_CONFIG_BYTES), str(directory / CONFIG_FILE))
    path = directory / GENERATION_FILE
    generation = Keys(read_json(path, MAX_CONFIG_BYTES) if path.exists() else {}, str(path))
    defaults = GenerationDefaults(
        temperature=generation.number_or("temperature", 0.0, 2.0, None),
        # transformers writes 0 (and others -1) for "no limit"
        top_k=generation.integer_or("top_k", -1, 2**31 - 1, None)
        if generation.values.get("top_k") not in (0, -1)
        else None,
        top_p=generation.number_or("top_p", 1e-6, 1.0, None),
        min_p=generation.number_or("min_p", 0.0, 1.0, None),
        repetition_penalty=generation.number_or("repetition_penalty", 1e-6, 10.0, None),
    )
    eos_token_ids = _token_ids(generation, "eos_token_id") or _token_ids(config, "eos_token_id")
    bos_token_ids = _token_ids(generation, "bos_token_id") or _token_ids(config, "bos_token_id")
    return defaults, eos_token_ids, bos_token_ids[0] if bos_token_ids else None


def _family(config: Keys) -> tuple[str, Family]:
    """Find the row, and refuse whatever would change the output and that no row describes."""
    model_type = config.text("model_type")
    supported = f"supported are {', '.join(sorted(FAMILIES))}"
    if config.has("text_config"):
        raise UnsupportedModelError(
            f"{config.where}: model_type {shown(model_type)} wraps a text model in text_config; {supported}",
            hint="extract the text model with transformers first",
            param="model_type",
        )
    if model_type not in FAMILIES:
        code = "; its auto_map names Python code, which is never run" if config.has("auto_map") else ""
        raise UnsupportedModelError(
            f"{config.where}: model_type is {shown(model_type)}; {supported}{code}", param="model_type"
        )
    if config.has("auto_map"):
        log.info(
            "%s names Python code in auto_map; it is ignored, model_type %s is built in",
            config.where,
            model_type,
        )
    architectures = config.list_or("architectures", lambda v: isinstance(v, str), "strings") or []
    if architectures and not architectures[0].endswith("ForCausalLM"):
        raise UnsupportedModelError(
            f"{config.where}: architectures is {shown(architectures)}; only ...ForCausalLM is supported",
            param="architectures",
        )
    if config.flag("use_bidirectional_attention"):
        raise UnsupportedModelError(
            f"{config.where}: use_bidirectional_attention is true; only causal models generate text",
            param="use_bidirectional_attention",
        )
    return model_type, FAMILIES[model_type]


def _head_dim(config: Keys, row: Family, d_model: int, n_heads: int) -> int:
    if not config.has("head_dim") and row.head_dim is None and d_model % n_heads:
        raise CheckpointError(
            f"{config.where}: hidden_size {d_model} is not a multiple of its {n_heads} heads"
        )
    head_dim = config.integer_or("head_dim", 2, MAX_HEAD_DIM, row.head_dim or d_model // n_heads)
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise CheckpointError(
            f"{config.where}: head_dim is {head_dim}; it must be even and at most {MAX_HEAD_DIM}",
            param="head_dim",
        )
    return head_dim


def _dtype(config: Keys, directory: Path) -> Dtype:
    """The stated type, or that of most bytes where the config is silent."""
    name = config.text_or("dtype", config.text_or("torch_dtype", None))
    if name is None or name == "auto":
        n_bytes: Counter[str] = Counter()
        for ref in Checkpoint.open(directory).tensors.values():
            n_bytes[ref.dtype] += ref.n_bytes
        name = max(n_bytes, key=n_bytes.__getitem__, default="F32")
    name = name.removeprefix("torch.")
    if name not in _DTYPES:
        raise UnsupportedModelError(
            f"{config.where}: dtype is {shown(name)}; supported are float32, bfloat16 and float16",
            param="dtype",
        )
    return _DTYPES[name]


def _activation(config: Keys, row: Family) -> Literal["silu", "gelu_tanh"]:
    key, default = ("hidden_activation", "gelu_pytorch_tanh") if row.is_gemma else ("hidden_act", "silu")
    name = config.text_or(key, default)
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{config.where}: {key} is {shown(name)}; supported are {', '.join(_ACTIVATIONS)}", param=key
        )
    return _ACTIVATIONS[name]


def _softcap(config: Keys, key: str, default: float | None) -> float | None:
    """Null switches the cap off; an absent key means the family's default."""
    cap = config.number_or(key, 1e-3, 1e9, None) if key in config.values else default
    if cap is not None and default is None and key == "attn_logit_softcapping":
        # transformers reads the key for Gemma 3 and never applies it
        raise UnsupportedModelError(f"{config.where}: {key} is {cap:g}; this family has none", param=key)
    return cap


def _layers(config: Keys, row: Family, head_dim: int) -> tuple[LayerConfig, ...]:
    n_layers = config.integer("num_hidden_layers", 1, MAX_LAYERS)
    windows = row.windows(config, n_layers)
    local, full = _ropes(config, row, head_dim)
    is_sparse, moe = _moe(config, row)
    return tuple(
        LayerConfig(
            rope=full if window is None else local,
            window_tokens=window,
            moe=moe if is_sparse(layer) else None,
        )
        for layer, window in enumerate(windows)
    )


def _ropes(config: Keys, row: Family, head_dim: int) -> tuple[RopeConfig, RopeConfig]:
    """Return the rope of local (windowed) layers and that of the others."""
    scaling, params = config.object_or("rope_scaling"), config.object_or("rope_parameters")
    empty = Keys({}, config.where)

    def rope(params: Keys, theta: float, theta_key: str = "rope_theta") -> RopeConfig:
        return rope_config(
            config, params, theta_key=theta_key, theta=theta, head_dim=head_dim,
            interleaved=row.interleaved, rotary_frac=row.rotary_frac,
        )  # fmt: skip

    def either(params: Keys | None, theta: float) -> RopeConfig:
        """rope_scaling is the older name; where both stand, both must mean the same."""
        given = [keys for keys in (scaling, params) if keys and keys.values]
        found = [rope(keys, theta) for keys in given or [empty]]
        if found[0] != found[-1]:
            differing = next(
                f.name for f in fields(RopeConfig) if len({getattr(r, f.name) for r in found}) > 1
            )
            values = " and ".join(shown(getattr(r, differing)) for r in found)
            raise CheckpointError(
                f"{config.where}: rope_scaling and rope_parameters differ in {differing}: {values}",
                hint="say it once: put what holds into rope_parameters and remove rope_scaling",
                param="rope_parameters",
            )
        return found[0]

    is_nested = params is not None and any(key in params.values for key in LAYER_TYPES)
    if row.nested_rope:
        if params is not None and not is_nested and params.values:
            raise UnsupportedModelError(
                f"{config.where}: rope_parameters must be nested by layer type in this family",
                param="rope_parameters",
            )
        full, local = (params and params.object_or(key) for key in LAYER_TYPES)
        return rope(local or empty, row.rope_theta, "rope_local_base_freq"), either(full, 1_000_000.0)
    if is_nested:
        raise UnsupportedModelError(
            f"{config.where}: rope_parameters is nested by layer type; this family has one rope",
            param="rope_parameters",
        )
    one = either(params, row.rope_theta)
    return one, one


def _moe(config: Keys, row: Family) -> tuple[Callable[[int], bool], MoeConfig | None]:
    """Return which layers have experts, and what those are."""
    if row.moe == "none":
        return lambda layer: False, None
    count_key = "num_experts" if config.has("num_experts") else "num_local_experts"
    n_experts = config.integer(count_key, 1, MAX_EXPERTS)
    n_active = config.integer("num_experts_per_tok", 1, n_experts)
    if row.moe == "mixtral":
        d_mlp = config.integer("intermediate_size", 1, MAX_WIDTH)
        return lambda layer: True, MoeConfig(
            n_experts=n_experts, n_active=n_active, d_mlp=d_mlp, normalise_topk=True
        )
    step = config.integer_or("decoder_sparse_step", 1, MAX_LAYERS, 1)
    dense = config.list_or("mlp_only_layers", lambda v: type(v) is int, "layer numbers") or []
    moe = MoeConfig(
        n_experts=n_experts,
        n_active=n_active,
        d_mlp=config.integer("moe_intermediate_size", 1, MAX_WIDTH),
        normalise_topk=config.flag("norm_topk_prob"),
    )
    return lambda layer: layer not in dense and (layer + 1) % step == 0, moe


def _token_ids(config: Keys, key: str) -> tuple[int, ...]:
    """One id, a list of ids, or none."""

    def is_id(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**31

    if isinstance(config.values.get(key), list):
        return tuple(config.list_or(key, is_id, "token ids >= 0") or ())
    return (config.integer(key, 0, 2**31 - 1),) if config.has(key) else ()
