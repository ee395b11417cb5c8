"""The caller's side of an engine process, async: submit prompts, read answers. No torch."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from sailfish.base.config import EngineConfig
from sailfish.base.errors import EngineError, RequestError, WorkerDied, error_from_code
from sailfish.checkpoint.messages import Message as ReadMessage
from sailfish.checkpoint.messages import read_messages
from sailfish.checkpoint.template import ChatTemplate, encode_chat
from sailfish.checkpoint.tokenizer import Tokenizer
from sailfish.engine import wire
from sailfish.engine.api import Chunk, Completion, EngineInfo, EngineStats, Options, SamplingParams, token_ids
from sailfish.engine.launch import EngineProcess, Progress
from sailfish.engine.pace import Pace
from sailfish.engine.step import RowSampling
from sailfish.engine.stream import AnswerStream, collect

log = logging.getLogger(__name__)

Prompt = str | Sequence[int]
Message = Mapping[str, Any] | ReadMessage

_RECONNECT_S = 0.2
_MAX_BEAT_AGE_S = 5.0
_MAX_STALL_S = 60.0
_GREEDY_BELOW = 1e-5
"""Dividing logits by less overflows float32; the draw is the likeliest token anyway."""
_ENCODE_INLINE_CHARS = 8192
"""Longer texts are tokenised in a thread, so that other requests of this process go on."""


class AsyncEngine:
    """A connection to one engine process. Make one with `start` or `attach`; not shared between loops."""

    def __init__(self, socket_path: Path, process: EngineProcess | None) -> None:
        self.info: EngineInfo
        self.tokenizer: Tokenizer
        self.template: ChatTemplate | None
        self._socket_path = socket_path
        self._process = process
        self._keys = itertools.count()
        self._streams: dict[int, AnswerStream] = {}
        self._admissions: dict[int, asyncio.Future[None]] = {}
        self._stats: dict[int, asyncio.Future[EngineStats]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._beat: wire.Beat | None = None
        self._beat_at_s = 0.0

    @classmethod
    async def start(
        cls,
        engine_dir: str | Path,
        *,
        name: str | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        config: EngineConfig | None = None,
    ) -> AsyncEngine:
        """Start an engine process for an engine directory and attach to it; `close` ends both."""
        process = EngineProcess(
            Path(engine_dir), config or EngineConfig(), name=name, on_progress=on_progress
        )
        try:
            await asyncio.to_thread(process.start)
            return await cls.attach(process.socket_path, process=process)
        except BaseException:
            await asyncio.to_thread(process.stop)
            raise

    @classmethod
    async def attach(cls, socket_path: Path, *, process: EngineProcess | None = None) -> AsyncEngine:
        """Attach to a running engine process. Reconnects by itself when the process is replaced."""
        engine = cls(socket_path, process)
        reader = await engine._connect()
        directory = Path(engine.info.engine_dir)
        engine.tokenizer = Tokenizer.load(directory)
        engine.template = ChatTemplate.load(directory)
        engine._reading = asyncio.create_task(engine._read_for_ever(reader))
        return engine

    async def close(self) -> None:
        """Detach, and end the engine process when this object started it. Idempotent."""
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading
        self._lose_connection("this engine was closed")
        if self.template is not None:
            self.template.close()
        if self._process is not None:
            await asyncio.to_thread(self._process.stop)

    def end_process(self) -> None:
        """End the engine process from any thread; what is left to do is `close`."""
        process, self._process = self._process, None
        if process is not None:
            process.stop()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def ready(self) -> str | None:
        """None when requests would be served, else the reason they would not."""
        if self._writer is None:
            return "the engine process is gone"
        age_s = asyncio.get_running_loop().time() - self._beat_at_s
        if age_s > _MAX_BEAT_AGE_S:
            return f"no heartbeat from the engine process for {age_s:.0f} s"
        if self._beat is not None and self._beat.stalled_s > _MAX_STALL_S:
            return f"one step has been running for {self._beat.stalled_s:.0f} s"
        if self._beat is not None and self._beat.draining:
            return "the engine is draining"
        return None

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, options: Options = Options()
    ) -> list[Completion]:
        """Return the `n` whole answers to one prompt."""
        return await collect(self.stream(prompt, params, options))

    async def generate_many(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        options: Options = Options(),
    ) -> list[list[Completion]]:
        """Return the answers to several prompts, generated together; when one fails, the others end.

        `params` are those of all prompts, or of each: prompts that share a seed share their draws.
        """
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise RequestError(
                f"{len(params)} params are not those of {len(prompts)} prompts", param="params"
            )
        pace = Pace(self.info.max_sequences)

        async def one(prompt: Prompt, params: SamplingParams) -> list[Completion]:
            async with pace.places(params.n):
                return await self.generate(prompt, params, options)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(*pair)) for pair in zip(prompts, params, strict=True)]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        options: Options = Options(),
    ) -> list[Completion]:
        """Return the `n` whole answers to a conversation."""
        return await collect(self.stream_chat(messages, params, options))

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, options: Options = Options()
    ) -> AsyncIterator[Chunk]:
        """Yield chunks of the answers as they are generated; leaving the loop ends the request."""
        ids = await self.encode(prompt) if isinstance(prompt, str) else prompt
        answers = await self.submit(ids, params or SamplingParams(), options)
        try:
            async for chunk in answers:
                yield chunk
        finally:
            answers.end()

    async def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        options: Options = Options(),
    ) -> AsyncIterator[Chunk]:
        """Like `stream`, for a conversation."""
        ids = await self.encode_chat(messages)
        async for chunk in self.stream(ids, params, options):
            yield chunk

    async def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Tokenise a prompt; special-token text counts as special tokens."""

        def run() -> list[int]:
            return self.tokenizer.encode(
                text, special=True, add_special=add_special, max_tokens=self.info.context_tokens
            )

        return run() if len(text) <= _ENCODE_INLINE_CHARS else await asyncio.to_thread(run)

    async def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Render the chat template and tokenise; special-token text in contents stays text."""
        if self.template is None:
            raise RequestError(
                f"model {self.info.name!r} has no chat template",
                hint="use /v1/completions, or serve it with --chat-template FILE",
                param="messages",
                code="no_chat_template",
            )
        return await asyncio.to_thread(
            encode_chat,
            self.tokenizer,
            self.template,
            [message.for_template() for message in read_messages(messages)],
            add_generation_prompt=add_generation_prompt,
            template_kwargs=template_kwargs,
            max_tokens=self.info.context_tokens,
        )

    async def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        options: Options = Options(),
    ) -> AnswerStream:
        """Have the engine accept one prompt; raises RequestError, Overloaded or WorkerDied."""
        params = SamplingParams.checked(params, self.info.vocab_size)
        options = Options.checked(options)
        prompt_ids = token_ids(prompt_ids, self.info.vocab_size)
        most = self.info.max_sequences + self.info.max_queue
        if params.n > most:
            raise RequestError(f"n is {params.n}; this engine can have {most} answers at work", param="n")
        if self._writer is None:
            raise WorkerDied("the engine process is gone", retry_after_s=1.0)
        keys = [next(self._keys) for _ in range(params.n)]
        answers = AnswerStream(prompt_ids, params, keys, self.tokenizer, self._send, self._forget)
        loop = asyncio.get_running_loop()
        admissions = [loop.create_future() for _ in keys]
        seed = secrets.randbits(63) if params.seed is None else params.seed
        try:
            for i, (key, admission) in enumerate(zip(keys, admissions, strict=True)):
                self._streams[key] = answers
                self._admissions[key] = admission
                sampling = self._resolve(params, seed + i, wants_prompt=i == 0)
                self._send(
                    wire.Submit(
                        key,
                        prompt_ids,
                        sampling,
                        params.max_tokens,
                        options.priority,
                        options.deadline_s,
                        options.tenant,
                    )
                )
            await asyncio.gather(*admissions)
        except BaseException:
            answers.end()
            raise
        finally:
            for key in keys:
                self._admissions.pop(key, None)
        return answers

    async def stats(self) -> EngineStats:
        """Return the engine process's live figures; raises WorkerDied when it does not answer."""
        if self._writer is None:
            raise WorkerDied("the engine process is gone", retry_after_s=1.0)
        nonce = next(self._keys)
        reply: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._stats[nonce] = reply
        self._send(wire.StatsQuery(nonce))
        try:
            return await asyncio.wait_for(reply, timeout=_MAX_BEAT_AGE_S)
        except TimeoutError:
            raise WorkerDied("the engine process does not answer", retry_after_s=1.0) from None
        finally:
            self._stats.pop(nonce, None)

    def report(self, counters: dict[str, float]) -> None:
        """Leave this process's own cumulative counters with the engine, for all to read in `stats`."""
        self._send(wire.Report(f"process-{os.getpid()}", counters))

    def _resolve(self, params: SamplingParams, seed: int, *, wants_prompt: bool) -> RowSampling:
        info = self.info

        def value(name: str, otherwise: float) -> float:
            asked = getattr(params, name)
            return float(info.defaults.get(name, otherwise) if asked is None else asked)

        temperature = value("temperature", 1.0)
        eos = () if params.ignore_eos else tuple(info.eos_token_ids)
        return RowSampling(
            temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
            top_k=min(int(value("top_k", info.vocab_size)), info.vocab_size),
            top_p=value("top_p", 1.0),
            min_p=value("min_p", 0.0),
            repetition_penalty=value("repetition_penalty", 1.0),
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            seed=(seed + 2**63) % 2**64 - 2**63,
            min_tokens=params.min_tokens,
            stop_token_ids=tuple(dict.fromkeys((*eos, *params.stop_token_ids))),
            logit_bias=tuple(params.logit_bias.items()),
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs if wants_prompt else None,
        )

    def _forget(self, key: int) -> None:
        self._streams.pop(key, None)

    def _send(self, message: wire.ToEngine) -> None:
        if self._writer is not None:
            self._writer.write(wire.frame(message))

    async def _connect(self) -> asyncio.StreamReader:
        try:
            reader, writer = await asyncio.open_unix_connection(str(self._socket_path))
        except OSError as error:
            raise WorkerDied(f"the engine process cannot be reached: {error.strerror}") from error
        hello = await wire.read_to_client(reader)
        if not isinstance(hello, wire.Hello):
            writer.close()
            raise WorkerDied("the engine process closed the connection before it said anything")
        self.info = hello.info
        self._writer = writer
        self._beat = None
        self._beat_at_s = asyncio.get_running_loop().time()
        return reader

    async def _read_for_ever(self, reader: asyncio.StreamReader) -> None:
        while True:
            try:
                while (message := await wire.read_to_client(reader)) is not None:
                    self._handle(message)
            except (EngineError, msgspec.DecodeError, UnicodeDecodeError) as error:
                log.error("the engine process sent a malformed frame: %s", error)
            self._lose_connection("the engine process died")
            while True:
                await asyncio.sleep(_RECONNECT_S)
                try:
                    reader = await self._connect()
                    break
                except WorkerDied:
                    continue

    def _handle(self, message: wire.ToClient) -> None:
        match message:
            case wire.Events(items=items):
                for event in items:
                    stream = self._streams.get(event.key)
                    if stream is not None:
                        stream.put(event.key, event)
            case wire.Accepted(key=key):
                admission = self._admissions.get(key)
                if admission is not None and not admission.done():
                    admission.set_result(None)
            case wire.Refused():
                self._refuse(message)
            case wire.Beat():
                self._beat = message
                self._beat_at_s = asyncio.get_running_loop().time()
            case wire.StatsReply(nonce=nonce, stats=stats):
                reply = self._stats.get(nonce)
                if reply is not None and not reply.done():
                    reply.set_result(stats)

    def _refuse(self, message: wire.Refused) -> None:
        admission = self._admissions.get(message.key)
        if admission is not None and not admission.done():
            error = error_from_code(message.code, message.message, retry_after_s=message.retry_after_s)
            error.param = message.param
            admission.set_exception(error)

    def _lose_connection(self, why: str) -> None:
        """Give every waiting caller its one final word."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        waiting: list[asyncio.Future[Any]] = [*self._admissions.values(), *self._stats.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(WorkerDied(why, retry_after_s=1.0))
        for key, stream in list(self._streams.items()):
            stream.put(key, WorkerDied(f"{why} before the answer was complete"))
