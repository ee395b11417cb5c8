"""The request bodies: every field there is, with its type and range, and how they are read."""

from __future__ import annotations

import difflib
import re
from http import HTTPStatus
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from sailfish.base.errors import RequestError
from sailfish.engine.api import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from sailfish.serve.errors import Refusal
from sailfish.serve.gateway.limits import LIMITS

T = TypeVar("T", bound=Struct)

INT32_MAX = 2**31 - 1
Count = Annotated[int, Meta(ge=1, le=INT32_MAX)]
TokenId = Annotated[int, Meta(ge=0, le=INT32_MAX)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Alternatives = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
ShortText = Annotated[str, Meta(max_length=512)]
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
        stop = self.stop or ()
        min_tokens = self.min_tokens or 0
        if max_tokens is not None:
            min_tokens = min(min_tokens, max_tokens)  # the text ends there either way
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            seed=self.seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            n=self.n or 1,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            skip_special_tokens=self.skip_special_tokens is not False,
        )


class TextPart(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A piece of text in a message."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Meta(min_length=1, max_length=1024)]


class Message(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: ShortText | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates know it; `developer` is OpenAI's newer word for system."""
        content = self.content if isinstance(self.content, str) else "\n".join(p.text for p in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message if self.name is None else message | {"name": self.name}


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
    """Variables for the chat template."""


class CompletionRequest(GenerateRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    prompt: Any
    """A text, a list of texts, a list of token ids, or a list of lists of token ids."""
    logprobs: Alternatives | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    """Nothing but n itself."""


class TokenizePrompt(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize with a text."""

    prompt: str
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
    Message: {
        "tool_calls": (None, []),
        "tool_call_id": (None,),
        "function_call": (None,),
        "refusal": (None,),
        "audio": (None,),
        "annotations": (None, []),
    },
}
"""Fields of OpenAI's that this server does not have yet, and the values with which they change nothing."""

_TEMPLATE_OWN = frozenset(
    {"tokenize", "chat_template", "add_generation_prompt", "messages", "tools", "conversation"}
)
_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")


def read(kind: type[T], value: dict[str, Any]) -> T:
    """Turn a JSON object into a request; raise a 400 that names the field at fault."""
    value = _without_neutral(kind, value, "")
    if isinstance(messages := value.get("messages"), list):
        value["messages"] = [
            _without_neutral(Message, message, f"messages[{i}].") if isinstance(message, dict) else message
            for i, message in enumerate(messages)
        ]
    try:
        request = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from None
    if isinstance(request, ChatRequest):
        for key in request.chat_template_kwargs or ():
            if key in _TEMPLATE_OWN:
                raise RequestError(f"chat_template_kwargs cannot set {key!r}", param="chat_template_kwargs")
    return request


def _without_neutral(kind: type[Struct], value: dict[str, Any], where: str) -> dict[str, Any]:
    """Drop fields of absent features that change nothing; refuse them otherwise, and unknown fields."""
    known = kind.__struct_fields__
    refused = REFUSED.get(kind, {})
    kept = {}
    for name, given in value.items():
        if name in known:
            kept[name] = given
        elif name not in refused:
            near = difflib.get_close_matches(name[:64], [*known, *refused], n=1, cutoff=0.0)
            raise Refusal(
                HTTPStatus.BAD_REQUEST,
                "unknown_parameter",
                f"unknown field {name[:64]!r}; the nearest known one is {near[0]!r}",
                param=where + name[:64],
            )
        elif not any(_same(given, neutral) for neutral in refused[name]):
            raise Refusal(
                HTTPStatus.BAD_REQUEST,
                "unsupported_parameter",
                f"{where}{name} is not supported by this server yet; leave it out",
                param=where + name,
            )
    return kept


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _explained(problem: str) -> RequestError:
    path = _PATH.search(problem)
    where = path.group(1) if path else ""
    what = problem[: path.start()] if path else problem
    if found := _UNKNOWN.match(what):
        return _coded("unknown_parameter", f"unknown field {found.group(1)[:64]!r}", where)
    if found := _MISSING.match(what):
        name = f"{where}.{found.group(1)}" if where else found.group(1)
        return _coded("missing_required_parameter", f"the field {name} is missing", name)
    code = "invalid_type" if ", got `" in what else "invalid_value"
    return _coded(code, f"{where}: {what}" if where else what, where)


def _coded(code: str, message: str, where: str) -> RequestError:
    return RequestError(message, param=where or None, code=code)
