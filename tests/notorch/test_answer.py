"""From tokens to text: stop strings against brute force, whole characters, one end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sailfish.base.errors import DeadlineExceeded, EngineError, RequestAborted
from sailfish.checkpoint.tokenizer import Tokenizer
from sailfish.data import demo_model
from sailfish.engine.answer import Answer
from sailfish.engine.api import Chunk, SamplingParams, TokenLogprob
from sailfish.engine.wire import Event, Finish

TOKENIZER = Tokenizer.load(demo_model())
TEXTS = st.text(alphabet="ab c.\n√©é日本🎉", max_size=40)


def run(token_ids: list[int], params: SamplingParams, cuts: list[int]) -> list[Chunk]:
    """Feed tokens in pieces that end at `cuts`, the last one with a length finish, until the answer ends."""
    answer = Answer(0, 5, params, TOKENIZER)
    chunks = []
    edges = sorted({0, *(cut for cut in cuts if cut < len(token_ids)), len(token_ids)})
    for begin, end in zip(edges, edges[1:], strict=False):
        finish = Finish("length") if end == len(token_ids) else None
        chunks.append(answer.take(Event(1, token_ids[begin:end], finish=finish)))
        if chunks[-1].finish_reason is not None:
            break
    return chunks


@pytest.mark.slow
@given(
    TEXTS.filter(bool), st.lists(st.integers(1, 60)), st.lists(TEXTS.filter(bool), max_size=3), st.booleans()
)
@settings(deadline=None, max_examples=300)
def test_the_text_ends_at_the_first_stop_string_that_becomes_visible(
    text: str, cuts: list[int], stops: list[str], include: bool
) -> None:
    ids = TOKENIZER.encode(text, special=False, add_special=False)
    chunks = run(ids, SamplingParams(stop=tuple(stops), include_stop=include), cuts)
    stream, seen, expected, reason = TOKENIZER.stream(), "", None, None
    for token_id in ids:
        seen += stream.push(token_id)
        found = [(seen.find(stop), stop) for stop in stops if stop in seen]
        if found:
            at, reason = min(found)
            expected = seen[: at + (len(reason) if include else 0)]
            break
    assert "".join(chunk.text for chunk in chunks) == (text if expected is None else expected)
    assert chunks[-1].finish_reason == ("length" if expected is None else "stop")
    assert chunks[-1].stop_reason == reason
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


@given(
    st.lists(st.integers(0, TOKENIZER.vocab_size - 1), min_size=1, max_size=30), st.lists(st.integers(1, 30))
)
@settings(deadline=None, max_examples=200)
def test_chunks_of_any_tokens_join_to_the_whole_decode(ids: list[int], cuts: list[int]) -> None:
    chunks = run(ids, SamplingParams(skip_special_tokens=False), cuts)
    assert "".join(chunk.text for chunk in chunks) == TOKENIZER.decode(ids, skip_special=False)
    assert [token for chunk in chunks for token in chunk.token_ids] == ids
    last = chunks[-1]
    assert last.usage is not None and last.usage.completion_tokens == len(ids)


def test_a_character_made_of_several_tokens_comes_out_whole() -> None:
    ids = TOKENIZER.encode("🎉", special=False, add_special=False)
    assert len(ids) > 1, "the test needs a character of several tokens"
    chunks = run(ids, SamplingParams(), list(range(len(ids))))
    assert [chunk.text for chunk in chunks] == [""] * (len(ids) - 1) + ["🎉"]


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_cannot() -> None:
    ids = TOKENIZER.encode("a b", special=False, add_special=False)
    answer = Answer(0, 1, SamplingParams(stop=("a bc",)), TOKENIZER)
    assert answer.take(Event(1, ids)).text == ""
    assert answer.take(Event(1, [], finish=Finish("length"))).text == "a b"


def test_a_stop_tokens_text_is_left_out_unless_asked_for() -> None:
    (stop,) = TOKENIZER.encode("\n", special=False, add_special=False)
    body = TOKENIZER.encode("yes", special=False, add_special=False)
    event = Event(1, [*body, stop], finish=Finish("stop", stop_token=stop))
    without = Answer(0, 1, SamplingParams(), TOKENIZER).take(event)
    kept = Answer(0, 1, SamplingParams(include_stop=True), TOKENIZER).take(event)
    assert (without.text, kept.text) == ("yes", "yes\n")
    assert without.finish_reason == "stop" and without.stop_reason == stop


def test_logprobs_end_with_the_token_that_completed_the_stop_string() -> None:
    ids = TOKENIZER.encode("one. two", special=False, add_special=False)
    logprobs = [TokenLogprob(token_id, -1.0, []) for token_id in ids]
    chunk = Answer(0, 1, SamplingParams(stop=(".",)), TOKENIZER).take(Event(1, ids, logprobs))
    assert chunk.text == "one" and chunk.logprobs is not None
    assert len(chunk.logprobs) == len(chunk.token_ids) < len(ids)


@pytest.mark.parametrize(
    ("finish", "error"),
    [
        (Finish("deadline"), DeadlineExceeded),
        (Finish("abort", code="request_aborted"), RequestAborted),
        (Finish("error", code="nan_logits", message="not finite"), EngineError),
    ],
)
def test_a_failed_answer_raises_what_failed_it(finish: Finish, error: type[Exception]) -> None:
    with pytest.raises(error):
        Answer(0, 1, SamplingParams(), TOKENIZER).take(Event(1, [], finish=finish))
