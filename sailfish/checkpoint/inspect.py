"""Say what a checkpoint directory holds, from its small files and headers alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sailfish.base.errors import CheckpointError
from sailfish.checkpoint.files import read_json
from sailfish.checkpoint.formats.explain import LinearFacts, explain_linears, format_warnings
from sailfish.checkpoint.hf_config import CONFIG_FILE, load_generation_defaults, load_model_config
from sailfish.checkpoint.model_config import GenerationDefaults, ModelConfig
from sailfish.checkpoint.names import check_tensors, tensor_specs
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.checkpoint.template import ChatTemplate
from sailfish.checkpoint.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFacts:
    """What matters of a tokenizer."""

    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    adds_bos: bool
    n_special_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointReport:
    """A sound checkpoint's facts, and what in it deserves a second look."""

    directory: Path
    config: ModelConfig
    n_parameters: int
    """Weights the model uses; a tied head counts once."""
    bytes_by_dtype: dict[str, int]
    file_bytes: dict[str, int]
    """Size of each weight file."""
    tokenizer: TokenizerFacts | None
    has_chat_template: bool
    defaults: GenerationDefaults
    warnings: tuple[str, ...]
    linears: tuple[LinearFacts, ...] = ()
    """Its quantised linears one by one, where they were asked for."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.bytes_by_dtype.values())


def inspect_checkpoint(directory: Path | str, *, each_linear: bool = False) -> CheckpointReport:
    """Check config, headers and tokenizer, and report; a damaged checkpoint raises CheckpointError.

    With `each_linear` the weights of a quantised checkpoint are read too, and each linear is explained.
    """
    directory = Path(directory)
    config = load_model_config(directory)
    checkpoint = Checkpoint.open(directory)
    check_tensors(config, checkpoint)
    warnings: list[str] = []
    tokenizer = _tokenizer(directory, warnings)
    template = ChatTemplate.load(directory)
    _check_template(template, warnings)
    _check_agreement(directory, config, tokenizer, warnings)
    n_bytes: Counter[str] = Counter()
    for ref in checkpoint.tensors.values():
        n_bytes[ref.dtype] += ref.n_bytes
    if config.stored is not None:
        warnings += format_warnings(checkpoint, config.stored)
    elif len(n_bytes) > 1:
        warnings.append(f"weights of several dtypes: {', '.join(sorted(n_bytes))}")
    return CheckpointReport(
        directory=directory,
        config=config,
        n_parameters=sum(math.prod(spec.shape) for spec in tensor_specs(config)),
        bytes_by_dtype=dict(n_bytes),
        file_bytes=checkpoint.file_bytes,
        tokenizer=tokenizer,
        has_chat_template=template is not None,
        defaults=load_generation_defaults(directory)[0],
        warnings=tuple(warnings),
        linears=tuple(explain_linears(checkpoint)) if each_linear and config.stored is not None else (),
    )


def _tokenizer(directory: Path, warnings: list[str]) -> TokenizerFacts | None:
    try:
        tokenizer = Tokenizer.load(directory)
    except CheckpointError as error:
        warnings.append(f"only token ids can be served: {error}")
        return None
    return TokenizerFacts(
        vocab_size=tokenizer.vocab_size,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        adds_bos=tokenizer.adds_bos,
        n_special_tokens=len(tokenizer.special_tokens),
    )


def _check_template(template: ChatTemplate | None, warnings: list[str]) -> None:
    if template is None:
        warnings.append("no chat template: /v1/chat/completions needs one")
        return
    try:
        template.check()
    except CheckpointError as error:
        warnings.append(f"/v1/chat/completions cannot be served: {error}")
    finally:
        template.close()


def _check_agreement(
    directory: Path, config: ModelConfig, tokenizer: TokenizerFacts | None, warnings: list[str]
) -> None:
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        warnings.append(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: "
            "prompts with the others are refused"
        )
    if not config.eos_token_ids:
        warnings.append("no end-of-text token: answers end only at max_tokens or a stop string")
    keys = read_json(directory / CONFIG_FILE)
    if keys.get("dual_chunk_attention_config") is not None:
        warnings.append(
            "config.json sets dual_chunk_attention_config; it is ignored, so answers to very long prompts "
            "may be worse"
        )
    if keys.get("auto_map") is not None:
        warnings.append(
            f"config.json names Python code in auto_map; it is ignored, {config.family} is built in"
        )
