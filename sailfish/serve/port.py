"""What the server needs of an engine, so that it never imports one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from sailfish.checkpoint.messages import Message
from sailfish.engine.api import Chunk, EngineInfo, EngineStats, Options, SamplingParams


class TextStream(Protocol):
    """Turns tokens into text one by one; the pieces add up to the whole text."""

    def push(self, token_id: int) -> str:
        """Return the whole characters that a token completes."""

    def flush(self) -> str:
        """Return what is left at the end."""


class TemplatePort(Protocol):
    """A chat template."""

    @property
    def source(self) -> str:
        """Its Jinja text."""


class TokenizerPort(Protocol):
    """The part of a tokenizer that the server calls itself."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 .. vocab_size - 1."""

    @property
    def eos_token(self) -> str | None:
        """Text of the end-of-text token."""

    @property
    def bos_token(self) -> str | None:
        """Text of the beginning-of-text token."""

    def encode(self, text: str, *, special: bool = False, add_special: bool = True) -> list[int]:
        """Return the ids of a text; `special` reads special-token texts in it as those tokens."""

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """Return a decoder for one text."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of token ids."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, which need not be whole characters."""


class AnswerStream(Protocol):
    """The chunks of one engine request: all its answers interleaved, each ending with a finish_reason."""

    def __aiter__(self) -> AsyncIterator[Chunk]:
        """Iterate until the last answer ended; raise SailfishError when the request failed."""

    async def abort(self) -> None:
        """End the request now; harmless after its end."""


class EnginePort(Protocol):
    """A running engine, as `sailfish.engine.client.AsyncEngine` is one."""

    @property
    def info(self) -> EngineInfo:
        """What the engine is."""

    @property
    def tokenizer(self) -> TokenizerPort:
        """The model's tokenizer."""

    @property
    def template(self) -> TemplatePort | None:
        """The model's chat template, or None when it has none."""

    @property
    def ready(self) -> str | None:
        """Return None when the engine takes requests, else the reason why it does not."""

    async def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Tokenise a prompt."""

    async def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Render a conversation through the chat template and tokenise it."""

    async def submit(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        options: Options = Options(),
    ) -> AnswerStream:
        """Start a request; raise RequestError, ContextTooLong, Overloaded or WorkerDied."""

    async def stats(self) -> EngineStats:
        """Return live figures."""

    def report(self, counters: dict[str, float]) -> None:
        """Publish this process's own cumulative counters to `EngineStats.clients`."""
