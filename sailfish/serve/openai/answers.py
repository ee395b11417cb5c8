"""All answers to one HTTP request, whatever number of prompts it has."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import msgspec

from sailfish.base.errors import RequestError
from sailfish.engine.api import Chunk, Completion, Options, SamplingParams, Usage
from sailfish.serve.openai.replies import CachedTokens, UsageReply
from sailfish.serve.openai.requests import GenerateRequest
from sailfish.serve.port import AnswerStream
from sailfish.serve.site import Site


class Envelope(TypedDict):
    """What all chunks of a reply have in common."""

    id: str
    created: int
    model: str
    system_fingerprint: str


def fresh_envelope(site: Site, prefix: str) -> Envelope:
    """Return a new one for a request that begins now."""
    return Envelope(
        id=f"{prefix}-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=site.model,
        system_fingerprint=f"fp_{site.engine.info.digest.rpartition(':')[2][:12]}",
    )


@dataclass(slots=True)
class Tally:
    """Tokens of a request: a prompt counts once, however many answers it gets."""

    prompts: dict[int, Usage] = field(default_factory=dict)
    completion_tokens: int = 0

    def add(self, prompt: int, usage: Usage | None) -> None:
        """Count one answer that ended."""
        if usage is not None:
            self.prompts.setdefault(prompt, usage)
            self.completion_tokens += usage.completion_tokens

    def reply(self) -> UsageReply:
        """Return the sums."""
        prompt_tokens = sum(usage.prompt_tokens for usage in self.prompts.values())
        return UsageReply(
            prompt_tokens=prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=prompt_tokens + self.completion_tokens,
            prompt_tokens_details=CachedTokens(
                cached_tokens=sum(usage.cached_tokens for usage in self.prompts.values())
            ),
        )


class Answers:
    """One engine stream per prompt, read as one; `close` ends what still runs."""

    def __init__(self, streams: list[AnswerStream], *, is_scoring: bool = False) -> None:
        self._streams = streams
        self._is_scoring = is_scoring
        self.tally = Tally()

    @classmethod
    async def start(
        cls,
        site: Site,
        request: GenerateRequest,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        tenant: str,
        is_scoring: bool = False,
    ) -> Answers:
        """Submit every prompt, or none: when one is refused, those before it are aborted.

        `is_scoring`: the prompts' log-probabilities are all that is wanted; what is drawn is dropped.
        """
        info = site.engine.info
        most = min(site.limits.sequences, info.max_sequences + info.max_queue)
        if len(prompts) * params.n > most:
            raise RequestError(
                f"{len(prompts)} prompts times n {params.n} are more than the {most} answers this server "
                "can ever have at work; send several requests",
                param="n" if params.n > 1 else "prompt",
            )
        salt = tenant if request.cache_salt is None else f"{tenant}:{request.cache_salt}"
        answers = cls([], is_scoring=is_scoring)
        try:
            for prompt_ids in prompts:
                stream = await site.engine.submit(
                    prompt_ids,
                    params,
                    Options(priority=request.priority or 0, deadline_s=request.deadline_s, tenant=salt),
                )
                answers._streams.append(stream)
        except BaseException:
            await answers.close()
            raise
        return answers

    async def chunks(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """Yield (prompt, chunk) as they come; raise what ended the request early."""
        async for prompt, drawn in self._drawn():
            chunk = _without_answer(drawn) if self._is_scoring else drawn
            self.tally.add(prompt, chunk.usage)
            yield prompt, chunk

    async def _drawn(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        if len(self._streams) == 1:
            async for chunk in self._streams[0]:
                yield 0, chunk
            return
        iterators = [aiter(stream) for stream in self._streams]
        pending = {asyncio.ensure_future(anext(it)): i for i, it in enumerate(iterators)}
        try:
            while pending:
                done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    prompt = pending.pop(task)
                    try:
                        chunk = task.result()
                    except StopAsyncIteration:
                        continue
                    pending[asyncio.ensure_future(anext(iterators[prompt]))] = prompt
                    yield prompt, chunk
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def whole(self) -> list[tuple[int, Completion]]:
        """Wait for the end and return every answer, by prompt and then by index."""
        parts: dict[tuple[int, int], list[Chunk]] = {}
        async for prompt, chunk in self.chunks():
            parts.setdefault((prompt, chunk.index), []).append(chunk)
        return [(prompt, Completion.joined(chunks)) for (prompt, _), chunks in sorted(parts.items())]

    async def close(self) -> None:
        """Abort what has not ended."""
        for stream in self._streams:
            await stream.abort()


def _without_answer(chunk: Chunk) -> Chunk:
    usage = chunk.usage
    return msgspec.structs.replace(
        chunk,
        text="",
        token_ids=[],
        logprobs=None if chunk.logprobs is None else [],
        finish_reason=None if chunk.finish_reason is None else "length",
        stop_reason=None,
        usage=None if usage is None else msgspec.structs.replace(usage, completion_tokens=0),
    )
