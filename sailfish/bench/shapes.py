"""Checkpoints of well-known shapes with random weights: speed does not depend on what the weights say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sailfish.base.errors import ConfigError
from sailfish.build.cache import cache_root
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.checkpoint.names import TensorSpec, tensor_specs
from sailfish.checkpoint.safetensors_reader import INDEX_FILE
from sailfish.data import demo_model

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "bos_token_id": None,
    "eos_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        **_LLAMA,
        **_LLAMA3_ROPE,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        **_LLAMA,
        **_LLAMA3_ROPE,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        **_LLAMA,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
_SIGMA = 0.02
_POOL_ELEMENTS = 1 << 24
_SHARD_BYTES = 1 << 30


def random_checkpoint(shape: str, environ: Mapping[str, str], say: Callable[[str], None]) -> Path:
    """Return a checkpoint of one of SHAPES with random weights, written beside the engine cache once."""
    _config(shape)
    directory = cache_root(environ).parent / "shapes" / shape
    if not (directory / INDEX_FILE).exists():
        say(f"writing random weights of shape {shape} to {directory}")
        write_checkpoint(shape, directory)
    return directory


def write_checkpoint(shape: str, directory: Path) -> Path:
    """Write a bfloat16 checkpoint of one of SHAPES, with the demo model's tokenizer; return `directory`.

    Weights repeat one pool of normal draws (sigma 0.02) from changing offsets; norm weights are one.
    """
    config = _config(shape)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_model() / name, directory / name)
    normal = np.random.default_rng(0).standard_normal(_POOL_ELEMENTS, dtype=np.float32) * _SIGMA
    pool = (normal.view(np.uint32) >> 16).astype(np.uint16)
    index: dict[str, str] = {}
    with ThreadPoolExecutor() as writers:
        written = []
        for number, shard in enumerate(_shards(tensor_specs(load_model_config(directory))), start=1):
            file = f"model-{number:05d}.safetensors"
            written.append(writers.submit(_write_shard, directory / file, shard, pool))
            index.update((name, file) for name, _ in shard)
        for each in written:
            each.result()
    total_bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    (directory / INDEX_FILE).write_text(
        json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": index}), encoding="utf-8"
    )
    return directory


def _config(shape: str) -> dict[str, Any]:
    if shape not in SHAPES:
        raise ConfigError(f"no shape is called {shape!r}", hint=f"use one of {', '.join(SHAPES)}")
    return SHAPES[shape]


def _shards(specs: list[TensorSpec]) -> list[list[tuple[str, tuple[int, ...]]]]:
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    n_bytes = 0
    for spec in specs:
        for source, shape in zip(spec.sources, spec.source_shapes, strict=True):
            if n_bytes > _SHARD_BYTES:
                shards.append([])
                n_bytes = 0
            shards[-1].append((source, shape))
            n_bytes += 2 * int(np.prod(shape))
    return shards


def _write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], pool: np.ndarray) -> None:
    header, end = {}, 0
    for name, shape in tensors:
        n_bytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + n_bytes]}
        end += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    one = np.frombuffer(np.float32(1.0).tobytes(), dtype=np.uint16)[1]
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, (name, shape) in enumerate(tensors):
            left = int(np.prod(shape))
            if name.endswith("norm.weight"):
                file.write(np.full(left, one, dtype=np.uint16).tobytes())
                continue
            at = number * 7919 % _POOL_ELEMENTS
            while left:
                part = pool[at : at + left]
                file.write(part.data)
                left -= len(part)
                at = 0
