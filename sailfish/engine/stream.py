"""The answers to one submitted prompt as a stream of chunks, and their collection into whole answers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from sailfish.base.errors import SailfishError
from sailfish.checkpoint.tokenizer import Tokenizer
from sailfish.engine import wire
from sailfish.engine.answer import Answer
from sailfish.engine.api import Chunk, Completion, SamplingParams


class AnswerStream:
    """Iterate over it for the chunks of all `n` answers interleaved; each ends with a finish_reason.

    A reader that is behind gets the news it missed as one chunk. It must be the only reader.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        keys: list[int],
        tokenizer: Tokenizer,
        send: Callable[[wire.Abort], None],
        forget: Callable[[int], None],
    ) -> None:
        """Wait for news of `keys`, one per answer; `forget` is told each that needs no more news."""
        self.prompt_ids = prompt_ids
        self._send = send
        self._forget = forget
        self._events: deque[tuple[int, wire.Event | SailfishError]] = deque()
        self._news: asyncio.Future[None] | None = None
        """What the reader waits for when there are no events."""
        self._answers = {key: Answer(i, len(prompt_ids), params, tokenizer) for i, key in enumerate(keys)}

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        """Return the next chunk; raises what ended the request before its answers were complete."""
        while self._answers:
            while not self._events:
                self._news = asyncio.get_running_loop().create_future()
                await self._news
            key, event = self._events.popleft()
            answer = self._answers.get(key)
            if answer is None:
                continue
            if isinstance(event, SailfishError):
                self.end()
                raise event
            if self._events:
                event = self._joined(key, event)
            try:
                chunk = answer.take(event)
            except SailfishError:
                self._close(key)
                self.end()
                raise
            if chunk.finish_reason is not None:
                if event.finish is None:
                    self._send(wire.Abort(key, is_complete=True))
                self._close(key)
            return chunk
        raise StopAsyncIteration

    async def abort(self) -> None:
        """End every answer that is still growing. Idempotent; the engine frees its blocks at once."""
        self.end()

    def end(self) -> None:
        """Like `abort`, where nothing can be awaited."""
        for key in list(self._answers):
            self._send(wire.Abort(key))
            self._close(key)

    def put(self, key: int, event: wire.Event | SailfishError) -> None:
        """Hand over news of one answer."""
        self._events.append((key, event))
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def _joined(self, key: int, event: wire.Event) -> wire.Event:
        """Return the event and those of the same answer right behind it as one."""
        events = [event]
        while self._events:
            next_key, following = self._events[0]
            if next_key != key or isinstance(following, SailfishError):
                break
            events.append(following)
            self._events.popleft()
        return event if len(events) == 1 else wire.joined(events)

    def _close(self, key: int) -> None:
        self._answers.pop(key, None)
        self._forget(key)


async def collect(chunks: AsyncIterator[Chunk]) -> list[Completion]:
    """Return the whole answers that a stream's chunks join to, in order."""
    parts: dict[int, list[Chunk]] = {}
    async for chunk in chunks:
        parts.setdefault(chunk.index, []).append(chunk)
    return [Completion.joined(parts[index]) for index in sorted(parts)]
