"""A tiny checkpoint directory written by hand, and engines built from it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path

from sailfish.artifact import Artifact
from sailfish.build.builder import build_engine

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "eos_token_id": 3,
    "bos_token_id": 1,
}
TOKENIZER = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}}
ENVIRON: Mapping[str, str] = {"PATH": ""}
"""No nvidia-smi in sight: the target is this machine's CPU."""


def write_checkpoint(directory: Path, *, n_shards: int = 1) -> Path:
    """Write a complete Llama checkpoint whose bytes count up, and return its directory."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "eos_token_id": 3}))
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (directory / "tokenizer_config.json").write_text("{}")
    shapes = tensor_shapes()
    if n_shards == 1:
        write_safetensors(directory / "model.safetensors", shapes)
        return directory
    weight_map = {}
    for shard in range(n_shards):
        name = f"model-{shard + 1:05d}-of-{n_shards:05d}.safetensors"
        part = {tensor: shape for i, (tensor, shape) in enumerate(shapes.items()) if i % n_shards == shard}
        write_safetensors(directory / name, part)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Return the checkpoint's tensors as transformers names them."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, 32)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (32,),
            f"{layer}.self_attn.q_proj.weight": (32, 32),
            f"{layer}.self_attn.k_proj.weight": (16, 32),
            f"{layer}.self_attn.v_proj.weight": (16, 32),
            f"{layer}.self_attn.o_proj.weight": (32, 32),
            f"{layer}.post_attention_layernorm.weight": (32,),
            f"{layer}.mlp.gate_proj.weight": (48, 32),
            f"{layer}.mlp.up_proj.weight": (48, 32),
            f"{layer}.mlp.down_proj.weight": (32, 48),
        }
    return shapes | {"model.norm.weight": (32,), "lm_head.weight": (64, 32)}


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a BF16 safetensors file; each tensor's bytes depend on its name."""
    header, data = {}, b""
    for name, shape in shapes.items():
        n_bytes = 2 * prod(shape)
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + n_bytes],
        }
        data += tensor_bytes(name, n_bytes)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def tensor_bytes(name: str, n_bytes: int) -> bytes:
    """Return what `write_safetensors` stores for a tensor."""
    seed = sum(name.encode())
    return bytes((seed + 7 * i) % 251 for i in range(n_bytes))


def build(checkpoint: Path, out: Path, *, bundle: bool = False, force: bool = False) -> Artifact:
    """Build an engine for the sm_90 profile, so that the result is the same on every machine."""
    return build_engine(checkpoint, out, target="sm_90", bundle=bundle, force=force, environ=ENVIRON)
