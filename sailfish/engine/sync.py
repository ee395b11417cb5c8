"""The caller's side of an engine process for threaded Python: the async client on a loop of its own."""

from __future__ import annotations

import asyncio
import atexit
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from sailfish.base.config import EngineConfig
from sailfish.base.errors import WorkerDied
from sailfish.checkpoint.tokenizer import Tokenizer
from sailfish.engine.api import Chunk, Completion, EngineInfo, EngineStats, Options, SamplingParams
from sailfish.engine.client import AsyncEngine, Message, Prompt

T = TypeVar("T")


class Engine:
    """An engine directory, loaded and answering. Any thread may call it; close it or use `with`.

    >>> with Engine("books-4m.engine") as engine:
    ...     print(engine.generate("It was a dark", SamplingParams(max_tokens=20))[0].text)
    """

    def __init__(
        self, engine_dir: str | Path, *, name: str | None = None, config: EngineConfig | None = None
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sailfish-client", daemon=True)
        self._thread.start()
        self._lock = threading.Lock()
        """Held to start work on the loop or to forbid it."""
        self._is_closed = False
        try:
            self._engine = self._call(AsyncEngine.start(engine_dir, name=name, config=config))
        except BaseException:
            self._is_closed = True
            self._stop_loop()
            raise
        _open.add(self)

    @property
    def info(self) -> EngineInfo:
        """What the engine is."""
        return self._engine.info

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._engine.tokenizer

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, options: Options = Options()
    ) -> list[Completion]:
        """Return the `n` whole answers to one prompt (text, or token ids)."""
        return self._call(self._engine.generate(prompt, params, options))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        options: Options = Options(),
    ) -> list[Completion]:
        """Return the `n` whole answers to a conversation."""
        return self._call(self._engine.chat(messages, params, options))

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        options: Options = Options(),
    ) -> list[list[Completion]]:
        """Return the answers to several prompts, generated together; `params` of all of them, or of each."""
        return self._call(self._engine.generate_many(prompts, params, options))

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, options: Options = Options()
    ) -> Iterator[Chunk]:
        """Yield chunks of the answers as they are generated; leaving the loop ends the request."""
        return self._iterate(self._engine.stream(prompt, params, options))

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        options: Options = Options(),
    ) -> Iterator[Chunk]:
        """Like `stream`, for a conversation."""
        return self._iterate(self._engine.stream_chat(messages, params, options))

    def stats(self) -> EngineStats:
        """Return the engine's live figures."""
        return self._call(self._engine.stats())

    def close(self) -> None:
        """End the engine process, and with it what other threads wait for. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._engine.close(), self._loop).result()
        self._stop_loop()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._begin(work)
        try:
            return future.result()
        finally:
            future.cancel()  # Ctrl-C ends the wait, and so the work

    def _begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self._lock:
            if self._is_closed:
                work.close()
                raise WorkerDied("this engine is closed", hint="make another one")
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _iterate(self, chunks: AsyncIterator[Chunk]) -> Iterator[Chunk]:
        received: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()

        async def receive() -> None:
            async for chunk in chunks:
                received.put(chunk)

        future = self._begin(receive())
        future.add_done_callback(lambda _: received.put(None))
        try:
            while (chunk := received.get()) is not None:
                yield chunk
            future.result()
        finally:
            future.cancel()

    def _stop_loop(self) -> None:
        """End the loop once everyone who waited for it has been told."""

        async def finish() -> None:
            await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(finish(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


_open: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """End the engines of a script that ends without closing them."""
    for engine in list(_open):
        if not engine._is_closed:
            engine._engine.end_process()  # here, since asyncio's own threads are gone by now
            engine.close()
