"""A reader of answers that is behind gets what it missed as one chunk; nothing is lost or reordered."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from sailfish.base.errors import SailfishError, WorkerDied
from sailfish.checkpoint.tokenizer import Tokenizer
from sailfish.engine import wire
from sailfish.engine.api import Chunk, SamplingParams, TokenLogprob
from sailfish.engine.stream import AnswerStream


class _Letters:
    """A tokenizer whose token 0 is "a", 1 is "b" and so on."""

    def stream(self, *, skip_special: bool = True) -> _Letters:
        return self

    def push(self, token_id: int) -> str:
        return chr(ord("a") + token_id)

    def flush(self) -> str:
        return ""


def _stream(n: int = 1, **params: object) -> tuple[AnswerStream, list[wire.Abort]]:
    sent: list[wire.Abort] = []
    checked = SamplingParams(n=n, **params).checked(26)  # type: ignore[arg-type]
    tokenizer = cast(Tokenizer, _Letters())
    return AnswerStream([1, 2], checked, list(range(n)), tokenizer, sent.append, lambda key: None), sent


def _read(stream: AnswerStream, events: list[tuple[int, wire.Event | SailfishError]]) -> list[Chunk]:
    async def run() -> list[Chunk]:
        for key, event in events:
            stream.put(key, event)
        return [chunk async for chunk in stream]

    return asyncio.run(run())


def _event(key: int, *token_ids: int, finish: str | None = None) -> tuple[int, wire.Event]:
    finished = None if finish is None else wire.Finish(finish)
    return key, wire.Event(key=key, token_ids=list(token_ids), finish=finished)


def test_what_a_reader_missed_comes_as_one_chunk() -> None:
    stream, _ = _stream()
    [chunk] = _read(stream, [_event(0, 0), _event(0, 1, 2), _event(0, 3, finish="length")])
    assert (chunk.text, chunk.token_ids, chunk.finish_reason) == ("abcd", [0, 1, 2, 3], "length")
    assert chunk.usage is not None and chunk.usage.completion_tokens == 4


def test_a_reader_that_keeps_up_gets_every_token_by_itself() -> None:
    stream, _ = _stream()

    async def run() -> list[str]:
        texts = []
        for event in (_event(0, 0), _event(0, 1), _event(0, 2, finish="length")):
            asyncio.get_running_loop().call_soon(stream.put, *event)
            texts.append((await anext(stream)).text)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        return texts

    assert asyncio.run(run()) == ["a", "b", "c"]


def test_answers_of_one_request_stay_apart_and_in_order() -> None:
    stream, _ = _stream(n=2)
    events = [_event(0, 0), _event(1, 5), _event(1, 6), _event(0, 1, finish="length")]
    chunks = _read(stream, [*events, _event(1, 7, finish="length")])
    assert [(chunk.index, chunk.text) for chunk in chunks] == [(0, "a"), (1, "fg"), (0, "b"), (1, "h")]


def test_a_stop_string_inside_joined_news_ends_the_answer_there() -> None:
    stream, sent = _stream(stop="c")
    [chunk] = _read(stream, [_event(0, 0), _event(0, 1), _event(0, 2), _event(0, 3)])
    assert (chunk.text, chunk.token_ids, chunk.stop_reason) == ("ab", [0, 1, 2], "c")
    assert sent == [wire.Abort(0, is_complete=True)]


def test_scores_of_joined_news_stay_with_their_tokens() -> None:
    first = wire.Event(
        key=0, token_ids=[4], logprobs=[TokenLogprob(4, -1.0, [])], prompt_logprobs=[], n_cached=1
    )
    second = wire.Event(
        key=0, token_ids=[5], logprobs=[TokenLogprob(5, -2.0, [])], finish=wire.Finish("length")
    )
    joined = wire.joined([first, second])
    assert [entry.token_id for entry in joined.logprobs or []] == joined.token_ids == [4, 5]
    assert (joined.n_cached, joined.prompt_logprobs, joined.finish) == (1, [], wire.Finish("length"))
    assert wire.joined([_event(0, 1)[1], _event(0, 2)[1]]).logprobs is None


def test_a_failure_comes_after_the_tokens_before_it() -> None:
    stream, _ = _stream()

    async def run() -> str:
        stream.put(*_event(0, 0))
        stream.put(*_event(0, 1))
        stream.put(0, WorkerDied("gone", retry_after_s=1.0))
        chunk = await anext(stream)
        with pytest.raises(WorkerDied):
            await anext(stream)
        return chunk.text

    assert asyncio.run(run()) == "ab"


def test_a_reader_that_is_cancelled_can_go_on() -> None:
    stream, _ = _stream()

    async def run() -> str:
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        stream.put(*_event(0, 3, finish="length"))
        return (await anext(stream)).text

    assert asyncio.run(run()) == "d"
