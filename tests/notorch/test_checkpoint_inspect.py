"""What `inspect` reports of a sound checkpoint, and that a damaged one is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_fixtures import (
    SHARED,
    base_config,
    byte_level_tokenizer,
    write_checkpoint,
    write_json,
    write_tokenizer,
)

from sailfish.base.errors import CheckpointError
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.checkpoint.inspect import inspect_checkpoint
from sailfish.checkpoint.names import tensor_specs


def write_model(directory: Path, dtype: str = "BF16", **extra: Any) -> Path:
    write_json(directory / "config.json", base_config("llama", **extra))
    tensors = {
        source: (dtype, shape)
        for spec in tensor_specs(load_model_config(directory))
        for source, shape in zip(spec.sources, spec.source_shapes, strict=True)
    }
    return write_checkpoint(directory, tensors)


def test_a_whole_checkpoint_is_reported_without_warnings(tmp_path: Path) -> None:
    backend = byte_level_tokenizer()
    write_model(tmp_path, vocab_size=backend.get_vocab_size(), eos_token_id=2)
    write_tokenizer(tmp_path, backend, eos_token="<|im_end|>", chat_template="x")
    report = inspect_checkpoint(tmp_path)
    n_layer = (32 + 2 * 16) * 32 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert report.n_parameters == 2 * n_layer + 2 * backend.get_vocab_size() * 32 + 32
    assert report.bytes_by_dtype == {"BF16": 2 * report.n_parameters}
    assert report.total_bytes < report.file_bytes["model.safetensors"]
    assert report.tokenizer is not None and report.tokenizer.eos_token == "<|im_end|>"
    assert report.has_chat_template and report.warnings == ()


def test_what_deserves_a_second_look_is_said(tmp_path: Path) -> None:
    write_model(tmp_path, auto_map={"AutoModel": "m.M"}, dual_chunk_attention_config={"chunk_size": 64})
    write_tokenizer(tmp_path, byte_level_tokenizer())
    warnings = "; ".join(inspect_checkpoint(tmp_path).warnings)
    for words in (
        "no chat template",
        "the model 64",
        "no end-of-text token",
        "auto_map; it is ignored",
        "dual_chunk_attention_config; it is ignored",
    ):
        assert words in warnings


def test_a_template_that_does_not_compile_is_said(tmp_path: Path) -> None:
    write_model(tmp_path, eos_token_id=2)
    write_tokenizer(tmp_path, byte_level_tokenizer(), chat_template="{% for m in messages %}")
    report = inspect_checkpoint(tmp_path)
    assert report.has_chat_template
    [warning] = [warning for warning in report.warnings if "/v1/chat/completions" in warning]
    assert warning.startswith("/v1/chat/completions cannot be served") and "endfor" in warning


def test_a_tokenizer_without_tokens_is_said(tmp_path: Path) -> None:
    write_json(write_model(tmp_path) / "tokenizer.json", {})
    assert "only token ids can be served" in inspect_checkpoint(tmp_path).warnings[0]
    empty = json.loads(byte_level_tokenizer().to_str())
    empty |= {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
    write_json(tmp_path / "tokenizer.json", empty)
    assert "holds no tokens" in inspect_checkpoint(tmp_path).warnings[0]


def test_a_checkpoint_without_a_tokenizer_can_still_be_inspected(tmp_path: Path) -> None:
    report = inspect_checkpoint(write_model(tmp_path))
    assert report.tokenizer is None and "only token ids can be served" in report.warnings[0]


def test_a_damaged_checkpoint_is_an_error(tmp_path: Path) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is truncated"):
        inspect_checkpoint(tmp_path)


@pytest.mark.skipif(not (SHARED / "models/books-28m").exists(), reason="the shared models are not here")
def test_parameters_agree_with_what_the_training_run_wrote_down() -> None:
    assert inspect_checkpoint(SHARED / "models/books-28m").n_parameters == 27_795_968
