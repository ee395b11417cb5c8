"""Checkpoint directories written by hand, byte by byte, for the tests of the checkpoint room."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SHARED = Path(__file__).parents[2].parent / "shared"
BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "U8": 1, "I64": 8, "F8_E4M3": 1}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


def header_of(tensors: Tensors) -> dict[str, Any]:
    """Lay tensors out one after the other."""
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        n_bytes = math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    return header


def safetensors_bytes(header: Any, n_data: int | None = None, *, raw: bytes | None = None) -> bytes:
    """One file: length, header, and data that counts 0, 1, 2 ... 250, 0, ..."""
    text = json.dumps(header).encode() if raw is None else raw
    if n_data is None:
        n_data = max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)
    return struct.pack("<Q", len(text)) + text + bytes(i % 251 for i in range(n_data))


def write_checkpoint(directory: Path, tensors: Tensors, *, shards: int = 0) -> Path:
    """Write model.safetensors, or that many shards and an index."""
    directory.mkdir(exist_ok=True, parents=True)
    if not shards:
        (directory / "model.safetensors").write_bytes(safetensors_bytes(header_of(tensors)))
        return directory
    weight_map = {}
    names = list(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        (directory / file).write_bytes(safetensors_bytes(header_of(part)))
        weight_map |= dict.fromkeys(part, file)
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return directory


def write_json(path: Path, value: Any) -> Path:
    """Write JSON, making the directory if need be."""
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(value))
    return path


def base_config(model_type: str, **extra: Any) -> dict[str, Any]:
    """A tiny config.json of any family, without rope keys."""
    config: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "dtype": "float32",
    }
    if model_type in ("qwen3_moe", "mixtral"):
        key = "num_experts" if model_type == "qwen3_moe" else "num_local_experts"
        config |= {key: 4, "num_experts_per_tok": 2}
    if model_type == "qwen3_moe":
        config["moe_intermediate_size"] = 16
    return {k: v for k, v in (config | extra).items() if v is not ...}


def byte_level_tokenizer(begin: str = "", end: str = "") -> Tokenizer:
    """A byte-level BPE tokenizer trained on a few sentences; `begin` and `end` surround each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog " * 4, "naïve café 日本語 🎉"], trainer
    )
    return surrounding(tokenizer, begin, end)


def surrounding(tokenizer: Tokenizer, begin: str, end: str) -> Tokenizer:
    """Make the tokenizer put these control tokens around a text."""
    around = [text for text in (begin, "$A", end) if text]
    ids = [(text, tokenizer.token_to_id(text)) for text in {begin, end} if text]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    return tokenizer


def sentencepiece_like_tokenizer() -> Tokenizer:
    """Llama 2's kind: a begin token, U+2581 for spaces, byte tokens for unknown characters."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [*"\u2581abcdefghijklmnopqrstuvwxyz", "\u2581a", "th", "\u2581th", "he", "\u2581the"]
    merges = [("\u2581", "a"), ("t", "h"), ("\u2581", "th"), ("h", "e"), ("\u2581th", "e")]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    )
    return surrounding(tokenizer, "<s>", "")


def write_tokenizer(directory: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """Write tokenizer.json and tokenizer_config.json."""
    directory.mkdir(exist_ok=True, parents=True)
    (directory / "tokenizer.json").write_text(tokenizer.to_str())
    write_json(directory / "tokenizer_config.json", config)
    return directory
