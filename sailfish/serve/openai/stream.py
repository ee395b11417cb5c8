"""Server-sent events as OpenAI sends them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sailfish.base.errors import SailfishError
from sailfish.engine.api import Chunk
from sailfish.serve.errors import ClientGone, ErrorReply, error_object, unexpected
from sailfish.serve.openai.answers import Answers
from sailfish.serve.openai.replies import ChatChunk, TextReply, UsageReply
from sailfish.serve.openai.requests import StreamOptions
from sailfish.serve.site import Site
from sailfish.serve.tether import Tether

E = TypeVar("E", ChatChunk, TextReply)

_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_PAD_BYTES = 64
_encoder = msgspec.json.Encoder()


class EventStream(Response):
    """The streamed reply to one request."""

    media_type = "text/event-stream"

    def __init__(self, site: Site, answers: Answers, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._site = site
        self._answers = answers
        self._events = events
        self._sent_at_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the answers end, the client leaves, or the server stops."""
        tether = Tether()
        idle_s = self._site.limits.keep_alive_s
        self._site.live.add(tether)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await tether.run(
                    self._pump(send), receive, idle_s=idle_s, on_idle=lambda: self._comment(send, idle_s)
                )
                last = b"data: [DONE]\n\n"
            except SailfishError as error:
                last = event(ErrorReply(error=error_object(error)))
            except ClientGone:
                raise
            except Exception as error:  # noqa: BLE001 - the process edge: the status is sent already
                last = event(ErrorReply(error=error_object(unexpected(error))))
            await send({"type": "http.response.body", "body": last})
        finally:
            self._site.live.discard(tether)
            await self._answers.close()

    async def _pump(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        async with aclosing(self._events) as events:
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self._sent_at_s = loop.time()

    async def _comment(self, send: Send, idle_s: float) -> None:
        if asyncio.get_running_loop().time() - self._sent_at_s >= idle_s:
            await send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})


def event(value: msgspec.Struct) -> bytes:
    """Return one event."""
    return b"data: " + _encoder.encode(value) + b"\n\n"


async def pieces(
    answers: Answers,
    opening: list[E],
    shape: Callable[[int, Chunk], E],
    closing: Callable[[UsageReply], E],
    options: StreamOptions | None,
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a reply: `opening`, each chunk in its `shape`, and the usage if asked for."""
    pad = bool(options and options.include_obfuscation)

    def encoded(piece: E) -> bytes:
        return event(_padded(piece)) if pad else event(piece)

    for piece in opening:
        yield encoded(piece)
    async with aclosing(answers.chunks()) as chunks:
        async for prompt, chunk in chunks:
            if chunk.text or chunk.finish_reason or chunk.logprobs or chunk.prompt_logprobs:
                yield encoded(shape(prompt, chunk))
    if options and options.include_usage:
        yield event(closing(answers.tally.reply()))


def _padded(piece: E) -> E:
    """Fill a piece up to a multiple of 64 bytes: its length then hardly tells which token it carries."""
    missing = -len(_encoder.encode(piece)) % _PAD_BYTES
    return msgspec.structs.replace(piece, obfuscation=secrets.token_hex(_PAD_BYTES)[:missing])
