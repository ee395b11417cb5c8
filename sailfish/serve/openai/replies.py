"""The reply bodies, whole and streamed."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from sailfish.engine.api import FinishReason


class CachedTokens(Struct, frozen=True, kw_only=True):
    """How much of the prompt was not computed."""

    cached_tokens: int


class UsageReply(Struct, frozen=True, kw_only=True):
    """Tokens a request used."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TokenChance(Struct, frozen=True, kw_only=True):
    """One alternative for one token of a chat answer."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(TokenChance, frozen=True, kw_only=True):
    """One token of a chat answer, and its alternatives."""

    top_logprobs: list[TokenChance]


class ChatLogprobs(Struct, frozen=True, kw_only=True):
    """Log-probabilities of a chat answer."""

    content: list[ChatToken]
    refusal: None = None


class PromptChance(Struct, frozen=True, kw_only=True):
    """One alternative for one token of the prompt."""

    logprob: float
    decoded_token: str


PromptLogprobs = list[dict[str, PromptChance] | None]


class ChatMessage(Struct, frozen=True, kw_only=True):
    """An assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatDelta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a chunk adds to an assistant's turn."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChoice(Struct, frozen=True, kw_only=True):
    """One whole chat answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None


class ChatChunkChoice(Struct, frozen=True, kw_only=True):
    """A piece of one chat answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None | UnsetType = UNSET


class ChatReply(Struct, frozen=True, kw_only=True):
    """The reply of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageReply
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatChunk(Struct, frozen=True, kw_only=True):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: UsageReply | None | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    obfuscation: str | UnsetType = UNSET


class TextLogprobs(Struct, frozen=True, kw_only=True):
    """Log-probabilities of a text completion, as parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Struct, frozen=True, kw_only=True):
    """One text completion, or a piece of one."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class TextReply(Struct, frozen=True, kw_only=True):
    """The reply of /v1/completions, and one event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: UsageReply | None | UnsetType = UNSET
    obfuscation: str | UnsetType = UNSET


class ModelItem(Struct, frozen=True, kw_only=True):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    parent: None = None
    max_model_len: int


class ModelList(Struct, frozen=True, kw_only=True):
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelItem]


class TokenizeReply(Struct, frozen=True, kw_only=True):
    """Token ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeReply(Struct, frozen=True, kw_only=True):
    """The text of token ids."""

    prompt: str


class TokenizerInfo(Struct, frozen=True, kw_only=True):
    """What a remote tokenizer needs to know."""

    eos_token: str | None
    bos_token: str | None
    pad_token: str | None
    chat_template: str | None
    vocab_size: int
    max_model_len: int


class StatusReply(Struct, frozen=True, kw_only=True):
    """The server takes requests."""

    status: Literal["ok"] = "ok"


class VersionReply(Struct, frozen=True, kw_only=True):
    """The server's version."""

    version: str
