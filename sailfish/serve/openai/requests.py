"""The request bodies: every field there is, with its type and range, and how they are read."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from sailfish.checkpoint.messages import NEUTRAL, Message, ShortText, convert, known_fields, read_messages
from sailfish.engine.api import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from sailfish.serve.gateway.limits import LIMITS

T = TypeVar("T", bound=Struct)

INT32_MAX = 2**31 - 1
Count = Annotated[int, Meta(ge=1, le=INT32_MAX)]
TokenId = Annotated[int, Meta(ge=0, le=INT32_MAX)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Alternatives = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
Scalar = str | int | float | bool | None
TokenKey = Annotated[str, Meta(pattern="^(0|[1-9][0-9]{0,9})$")]
TemplateKey = Annotated[str, Meta(pattern="^[A-Za-z_][A-Za-z0-9_]{0,63}$")]


class StreamOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a stream is laid out."""

    include_usage: bool | None = None
    """Send a last chunk with the token counts."""
    include_obfuscation: bool | None = None
    """Pad every chunk so that its size does not tell its text's."""


class GenerateRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What chat and text completions have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=INT32_MAX)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Count | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: (
        Annotated[dict[TokenKey, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_LOGIT_BIAS)]
        | None
    ) = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Alternatives | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] | None = None
    """Lower goes first."""
    deadline_s: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    """The request fails when it is not done by then."""
    cache_salt: ShortText | None = None
    """Only requests with the same salt (and key) share cached prefixes."""
    user: ShortText | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None

    def sampling(
        self, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """Return the engine's parameters; what the endpoints read differently is given by them."""
        asked = {name: getattr(self, name, None) for name in SamplingParams.__struct_fields__}
        asked |= {"max_tokens": max_tokens, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
        if max_tokens is not None and self.min_tokens is not None:
            asked["min_tokens"] = min(self.min_tokens, max_tokens)  # the text ends there either way
        given = {name: value for name, value in asked.items() if value is not None}
        return msgspec.convert(given, SamplingParams, str_keys=True)


class ChatRequest(GenerateRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=LIMITS.messages)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    """Needs logprobs to be true."""
    add_generation_prompt: bool | None = None
    """Open the assistant's turn at the end of the prompt (the default)."""
    chat_template_kwargs: dict[TemplateKey, Scalar] | None = None
    """Variables for the chat template; it must read every one of them."""


class CompletionRequest(GenerateRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    prompt: Any
    """A text, a list of texts, a list of token ids, or a list of lists of token ids."""
    max_tokens: Annotated[int, Meta(ge=0, le=INT32_MAX)] | None = None
    """16 when not given, as with OpenAI. 0, with echo alone, scores the prompt."""
    logprobs: Alternatives | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    """Nothing but n itself."""


class TokenizePrompt(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize with a text."""

    prompt: Annotated[str, Meta(max_length=LIMITS.tokenize_chars)]
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChat(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize with a conversation."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=LIMITS.messages)]
    model: str | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /detokenize."""

    tokens: list[TokenId]
    model: str | None = None


REFUSED: dict[type[Struct], dict[str, tuple[Any, ...]]] = {
    ChatRequest: {
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "parallel_tool_calls": (None, True, False),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "response_format": (None, {"type": "text"}),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "reasoning_effort": (None,),
        "verbosity": (None,),
        "web_search_options": (None,),
        "chat_template": (None,),
    },
    CompletionRequest: {"suffix": (None, ""), "response_format": (None, {"type": "text"})},
    Message: NEUTRAL,
}
"""Fields of OpenAI's that this server does not have yet, and the values with which they change nothing."""


def read(kind: type[T], value: dict[str, Any]) -> T:
    """Turn a JSON object into a request; raise a 400 that names the field at fault."""
    value = known_fields(kind, REFUSED.get(kind, {}), value)
    if "messages" in value:
        value["messages"] = read_messages(value["messages"])
    return convert(value, kind)
