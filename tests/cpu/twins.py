"""Tiny random twins of every supported family, written by transformers, each past its own edge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

CONTEXT_TOKENS = 512
VOCAB_SIZE = 320
_END = "<|end|>"

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT_TOKENS,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "pad_token_id": None,
    "eos_token_id": 256,
    "tie_word_embeddings": False,
}


def _rope(kind: str = "default", theta: float = 10_000.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **more}


_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_MOE = {"num_experts_per_tok": 2, "num_local_experts": 5}

TWINS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3": ("LlamaConfig", {"rope_parameters": _rope("llama3", 500_000.0, **_LLAMA3)}),
    "llama_linear": ("LlamaConfig", {"rope_parameters": _rope("linear", factor=4.0)}),
    "llama_yarn": (
        "LlamaConfig",
        {"rope_parameters": _rope("yarn", factor=8.0, original_max_position_embeddings=64)},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 37}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {}),
    "glm4": ("Glm4Config", {"rope_parameters": _rope(partial_rotary_factor=0.5)}),
    "gemma2": (
        "Gemma2Config",
        {
            "sliding_window": 40,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {
            "sliding_window": 29,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": _rope("linear", 1_000_000.0, factor=4.0),
                "sliding_attention": _rope(),
            },
        },
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**_MOE, "moe_intermediate_size": 48, "mlp_only_layers": [1]}),
    "qwen3_moe_normalised": ("Qwen3MoeConfig", {**_MOE, "moe_intermediate_size": 48, "norm_topk_prob": True}),
    "mixtral": ("MixtralConfig", {**_MOE, "sliding_window": None}),
}
"""Twin -> (transformers' config class, what it sets beyond the common shape)."""


def make_twin(family: str, directory: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write the twin under `directory`, unless it is there already, and return its checkpoint directory."""
    path = directory / f"{family}-{str(dtype).removeprefix('torch.')}"
    if not path.exists():
        config_class, settings = TWINS[family]
        config = getattr(transformers, config_class)(**{**_SHAPE, **settings})
        torch.manual_seed(7 + sum(family.encode()))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        _stir(model)
        model.generation_config.eos_token_id = config.eos_token_id
        model.to(dtype).save_pretrained(path, max_shard_size="200KB")
        _byte_tokenizer().save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": _END}), encoding="utf-8")
    return path


def load_truth(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Open a checkpoint with transformers, by its plainest attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    model.generation_config.eos_token_id = None
    return model.eval()


def write_classic_config(path: Path, to: Path) -> Path:
    """Write the twin's config.json in the form of transformers 4 into `to`, and return `to`."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    to.mkdir(parents=True, exist_ok=True)
    (to / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return to


def _stir(model: torch.nn.Module) -> None:
    """Make norms, biases and routers matter: none is left at the value it is initialised to."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            if "gemma" in model.config.model_type and "post_" in name:
                parameter.add_(50.0)  # else the scaled, tied embedding only ever predicts itself
            if name.endswith(("gate.weight", "router.weight")):
                parameter[1] = parameter[0] + 0.03 * torch.randn_like(parameter[0])  # near ties


def _byte_tokenizer() -> Tokenizer:
    """Return a tokenizer of single bytes and one end token."""
    vocab = {byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([_END])
    return tokenizer
