"""The unmodified openai client is the outside truth for our dialect."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import openai
import pytest
from fake_engine import FakeEngine
from serving import Running

from sailfish.base.errors import ContextTooLong, EngineError, Overloaded

Start = Callable[..., Running]
HELLO = [{"role": "user", "content": "hello"}]


def client_of(running: Running, **options: object) -> openai.OpenAI:
    return openai.OpenAI(base_url=running.url + "/v1", api_key="unused", max_retries=0, **options)


def test_a_chat_is_answered_whole(start: Start) -> None:
    with client_of(start()) as client:
        reply = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=6)
    assert reply.choices[0].message.content == "#hello"
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None and reply.usage.total_tokens == 12
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 1
    assert reply._request_id


def test_a_chat_is_answered_in_pieces(start: Start) -> None:
    with client_of(start()) as client:
        stream = client.chat.completions.create(
            model="fake", messages=HELLO, max_tokens=6, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "#hello"
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None] * 6 + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_several_answers_with_logprobs_come_in_chats_form(start: Start) -> None:
    with client_of(start()) as client:
        reply = client.chat.completions.create(
            model="fake", messages=HELLO, n=3, max_tokens=2, logprobs=True, top_logprobs=2
        )
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    logprobs = reply.choices[2].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [token.token for token in logprobs.content] == ["#", "h"]
    assert logprobs.content[0].bytes == [35]
    assert [top.token for top in logprobs.content[0].top_logprobs] == ["#", "$"]
    assert reply.usage is not None and reply.usage.completion_tokens == 6


@pytest.mark.parametrize("prompt", ["ab", ["ab"], [97, 98], [[97, 98]]])
def test_a_prompt_may_be_text_or_tokens(start: Start, prompt: list[int] | str) -> None:
    with client_of(start()) as client:
        reply = client.completions.create(model="fake", prompt=prompt, max_tokens=4)
    assert reply.choices[0].text == "abab"


def test_several_prompts_number_their_choices(start: Start) -> None:
    with client_of(start()) as client:
        reply = client.completions.create(model="fake", prompt=["a", "b"], n=2, max_tokens=1)
        stream = client.completions.create(model="fake", prompt=["a", "b"], n=2, max_tokens=1, stream=True)
        pieces = {chunk.choices[0].index: chunk.choices[0].text for chunk in stream}
    assert [(c.index, c.text) for c in reply.choices] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]
    assert pieces == {0: "a", 1: "a", 2: "b", 3: "b"}
    assert reply.usage is not None and reply.usage.prompt_tokens == 2


def test_echo_with_logprobs_scores_the_prompt(start: Start) -> None:
    with client_of(start()) as client:
        reply = client.completions.create(
            model="fake", prompt=[97, 98], max_tokens=1, n=2, echo=True, logprobs=2
        )
    for choice in reply.choices:
        assert choice.text == "aba"
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.tokens == ["a", "b", "a"]
        assert logprobs.token_logprobs == [None, -0.5, -0.5]
        assert logprobs.text_offset == [0, 1, 2]
        assert logprobs.top_logprobs is not None
        assert logprobs.top_logprobs[1:] == [{"b": -0.5, "c": -1.5}, {"a": -0.5, "b": -1.5}]


def test_a_prompt_is_scored_without_an_answer(start: Start) -> None:
    with client_of(start()) as client:
        wanted = {"model": "fake", "prompt": ["ab", "c"], "max_tokens": 0, "echo": True, "logprobs": 1}
        reply = client.completions.create(**wanted)
        pieces = list(client.completions.create(**wanted, stream=True))
    for choices in (reply.choices, [piece.choices[0] for piece in pieces]):
        assert {(c.index, c.text, c.finish_reason) for c in choices} == {
            (0, "ab", "length"),
            (1, "c", "length"),
        }
        scores = {c.index: c.logprobs.token_logprobs for c in choices if c.logprobs}
        assert scores == {0: [None, -0.5], 1: [None]}
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (3, 0, 3)


def test_offsets_count_the_characters_of_the_text(start: Start) -> None:
    prompt = [256, *"é€x".encode(), 0xC3]
    with client_of(start()) as client:
        wanted = {"model": "fake", "prompt": prompt, "max_tokens": 7, "echo": True, "logprobs": 0}
        whole = client.completions.create(**wanted).choices[0]
        pieces = [piece.choices[0] for piece in client.completions.create(**wanted, stream=True)]
    expected = [0, 3, 3, 4, 4, 4, 5, 6, 7, 7, 7, 8, 8, 8, 9]  # <s>, é, €, x, half a character; then again
    assert whole.logprobs is not None and whole.logprobs.text_offset == expected
    streamed = [offset for piece in pieces if piece.logprobs for offset in piece.logprobs.text_offset or []]
    assert streamed == expected


def test_half_a_character_is_shown_as_bytes(start: Start) -> None:
    with client_of(start()) as client:
        reply = client.completions.create(model="fake", prompt=[0xC3], max_tokens=1, logprobs=0)
    assert reply.choices[0].logprobs is not None
    assert reply.choices[0].logprobs.tokens == ["bytes:\\xc3"]


def test_models_are_listed_and_described(start: Start) -> None:
    with client_of(start()) as client:
        assert [model.id for model in client.models.list()] == ["fake"]
        assert client.models.retrieve("fake").owned_by == "sailfish"
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_the_async_client_streams_too(start: Start) -> None:
    running = start()

    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="unused") as client:
            stream = await client.chat.completions.create(
                model="fake", messages=HELLO, max_tokens=6, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == "#hello"


def test_the_stream_helper_of_the_client_assembles_an_answer(start: Start) -> None:
    with (
        client_of(start()) as client,
        client.chat.completions.stream(model="fake", messages=HELLO) as stream,
    ):
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "#hell"


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (ContextTooLong("too long"), openai.BadRequestError, "context_length_exceeded"),
        (Overloaded("full", retry_after_s=2.5), openai.InternalServerError, "overloaded"),
        (EngineError("step 3 failed at 0x7f00"), openai.InternalServerError, "engine_error"),
    ],
)
def test_errors_arrive_as_the_clients_own_classes(
    start: Start, error: Exception, kind: type[openai.APIStatusError], code: str
) -> None:
    with client_of(start(FakeEngine(refuse=error))) as client, pytest.raises(kind) as caught:
        client.chat.completions.create(model="fake", messages=HELLO)
    assert caught.value.code == code
    assert "0x7f00" not in caught.value.message
    if isinstance(error, Overloaded):
        assert caught.value.response.headers["retry-after"] == "3"
        assert caught.value.response.headers["retry-after-ms"] == "2500"


@pytest.mark.parametrize(
    ("failure", "code"),
    [(EngineError("step 3"), "engine_error"), (RuntimeError("bug"), "internal_error")],
)
def test_a_fault_in_the_middle_of_a_stream_reaches_the_client(
    start: Start, failure: EngineError, code: str
) -> None:
    engine = FakeEngine(fail_after=3, failure=failure)
    with client_of(start(engine)) as client:
        stream = client.chat.completions.create(model="fake", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError) as caught:
            list(stream)
    assert caught.value.code == code
