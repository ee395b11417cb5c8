"""Writes a Llama checkpoint as a GGUF file, so that llama.cpp can be measured on the same shape."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sailfish.checkpoint.safetensors_reader import Checkpoint

_MAGIC, _VERSION, _ALIGNMENT = b"GGUF", 3, 32
_UINT32, _INT32, _FLOAT32, _STRING, _ARRAY = 4, 5, 6, 8, 9
"""Types of values."""
_F32, _BF16 = 0, 30
"""Types of tensors."""
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_WHOLE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def write_gguf(checkpoint_dir: Path, path: Path) -> None:
    """Write a bfloat16 Llama checkpoint with a tied head: matrices as they are, norms in float32.

    For speed alone: rows of queries and keys keep Hugging Face's order, RoPE is not scaled, and token i is
    the text "t<i>". The format: github.com/ggml-org/ggml, docs/gguf.md.
    """
    checkpoint = Checkpoint.open(checkpoint_dir)
    config = json.loads((checkpoint_dir / "config.json").read_text(encoding="utf-8"))
    values = dict(_values(config))
    infos, offset = [], 0
    for name, ref in checkpoint.tensors.items():
        is_norm = len(ref.shape) == 1
        infos.append(
            _string(gguf_name(name))
            + struct.pack(f"<I{len(ref.shape)}Q", len(ref.shape), *reversed(ref.shape))
            + struct.pack("<IQ", _F32 if is_norm else _BF16, offset)
        )
        n_bytes = 2 * ref.n_bytes if is_norm else ref.n_bytes
        offset += n_bytes + -n_bytes % _ALIGNMENT
    head = _MAGIC + struct.pack("<IQQ", _VERSION, len(infos), len(values))
    head += b"".join(_string(key) + value for key, value in values.items()) + b"".join(infos)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(head + bytes(-len(head) % _ALIGNMENT))
        for name, ref in checkpoint.tensors.items():
            data = checkpoint.bytes(name)
            if len(ref.shape) == 1:
                data = (np.frombuffer(data, dtype=np.uint16).astype(np.uint32) << 16).data.cast("B")
            file.write(data)
            file.write(bytes(-data.nbytes % _ALIGNMENT))
    partial.rename(path)


def gguf_name(name: str) -> str:
    """Return what llama.cpp calls a tensor of a Hugging Face Llama checkpoint."""
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_NAMES[module]}.weight"


def _values(config: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield the metadata that llama.cpp asks of a Llama model."""
    yield "general.architecture", _text("llama")
    for key, field in (
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("vocab_size", "vocab_size"),
    ):
        yield f"llama.{key}", struct.pack("<II", _UINT32, config[field])
    yield "llama.attention.layer_norm_rms_epsilon", struct.pack("<If", _FLOAT32, config["rms_norm_eps"])
    yield "llama.rope.freq_base", struct.pack("<If", _FLOAT32, config["rope_theta"])
    n_tokens = config["vocab_size"]
    yield "tokenizer.ggml.model", _text("gpt2")
    yield "tokenizer.ggml.pre", _text("llama-bpe")
    yield "tokenizer.ggml.tokens", _array(_STRING, [_string(f"t{i}") for i in range(n_tokens)])
    yield "tokenizer.ggml.token_type", _array(_INT32, [struct.pack("<i", 1)] * n_tokens)
    yield "tokenizer.ggml.merges", _array(_STRING, [_string("t 0")])
    yield "tokenizer.ggml.eos_token_id", struct.pack("<II", _UINT32, config["eos_token_id"])


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _text(text: str) -> bytes:
    return struct.pack("<I", _STRING) + _string(text)


def _array(kind: int, items: list[bytes]) -> bytes:
    return struct.pack("<IIQ", _ARRAY, kind, len(items)) + b"".join(items)
