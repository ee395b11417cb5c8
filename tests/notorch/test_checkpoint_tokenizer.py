"""Text to ids and back: control tokens, characters cut in two, over-long and broken text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_fixtures import (
    SHARED,
    SPECIAL,
    byte_level_tokenizer,
    sentencepiece_like_tokenizer,
    write_json,
    write_tokenizer,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sailfish.base.errors import CheckpointError, ContextTooLong, RequestError
from sailfish.checkpoint.tokenizer import Tokenizer

NAMES: dict[str, Any] = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}}
BYTE_LEVEL = Tokenizer(byte_level_tokenizer(), {"bos_token": "<|endoftext|>"})
SENTENCEPIECE = Tokenizer(sentencepiece_like_tokenizer(), {"bos_token": "<s>"})
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte_level", "sentencepiece"])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def load(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path, byte_level_tokenizer(), **NAMES))


def streamed(tokenizer: Tokenizer, ids: list[int], *, skip_special: bool = True) -> str:
    stream = tokenizer.stream(skip_special=skip_special)
    return "".join([stream.push(token_id) for token_id in ids] + [stream.flush()])


def test_facts_come_from_the_files(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.special_tokens == set(SPECIAL)
    assert tokenizer.vocab_size == byte_level_tokenizer().get_vocab_size()
    assert not tokenizer.adds_bos


@pytest.mark.parametrize(("begin", "end"), [(True, False), (False, True), (True, True), (False, False)])
def test_begin_and_end_tokens_are_added_as_the_file_says(tmp_path: Path, begin: bool, end: bool) -> None:
    backend = byte_level_tokenizer("<|endoftext|>" * begin, "<|im_end|>" * end)
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, backend, add_bos_token=not begin, **NAMES))
    plain = tokenizer.encode("fox", add_special=False)
    assert tokenizer.encode("fox") == [0] * begin + plain + [2] * end
    assert tokenizer.adds_bos is begin


def test_special_token_text_is_text_unless_asked_for(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    text = "fox<|im_end|>dog"
    assert 2 in tokenizer.encode(text, special=True)
    plain = tokenizer.encode(text)
    assert not set(plain) & {0, 1, 2}
    assert tokenizer.decode(plain) == text


def test_special_tokens_are_decoded_only_when_asked_for() -> None:
    ids = [1, *BYTE_LEVEL.encode("fox"), 2]
    assert BYTE_LEVEL.decode(ids) == "fox" == streamed(BYTE_LEVEL, ids)
    whole = "<|im_start|>fox<|im_end|>"
    assert (
        BYTE_LEVEL.decode(ids, skip_special=False) == whole == streamed(BYTE_LEVEL, ids, skip_special=False)
    )


@BOTH
@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_text_comes_back_and_the_stream_adds_up_to_it(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    if tokenizer is BYTE_LEVEL:
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 5), max_size=60), skip_special=st.booleans())
def test_any_byte_level_ids_stream_to_what_the_library_decodes(ids: list[int], skip_special: bool) -> None:
    expected = BYTE_LEVEL.decode(ids, skip_special=skip_special)
    assert streamed(BYTE_LEVEL, ids, skip_special=skip_special) == expected


@BOTH
@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_no_piece_of_a_stream_ends_inside_a_character(tokenizer: Tokenizer, text: str) -> None:
    if "\ufffd" not in text:
        stream = tokenizer.stream()
        assert not any("\ufffd" in stream.push(token_id) for token_id in tokenizer.encode(text))


@BOTH
def test_an_answer_that_stops_inside_a_character_shows_a_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é🎉")[:-1]
    text = streamed(tokenizer, ids)
    assert text.strip().startswith("é") and text.endswith("\ufffd")


@BOTH
def test_endless_garbage_costs_the_same_for_every_token(tokenizer: Tokenizer) -> None:
    """A bias towards one stray byte must not make the server decode ever longer tails."""
    stray = tokenizer.encode("ß")[-1]
    stream = tokenizer.stream()
    start = time.process_time()
    text = "".join([stream.push(stray) for _ in range(20_000)] + [stream.flush()])
    assert len(text) == 20_000 and set(text) == {"\ufffd"}
    assert time.process_time() - start < 10


def test_tokens_show_their_text_and_bytes() -> None:
    accent = BYTE_LEVEL.encode("日")
    assert b"".join(map(BYTE_LEVEL.token_bytes, accent)) == "日".encode()
    assert BYTE_LEVEL.token_text(2) == "<|im_end|>"
    assert BYTE_LEVEL.token_bytes(10**6) == BYTE_LEVEL.token_bytes(-1) == b""
    vocab = {SENTENCEPIECE.token_text(i): i for i in range(SENTENCEPIECE.vocab_size)}
    assert " the" in vocab
    assert SENTENCEPIECE.token_bytes(SENTENCEPIECE.encode("é")[-1]) == "é".encode()[-1:]


@pytest.mark.parametrize("token_id", [-1, 2**31, 2**70])
def test_numbers_that_are_no_ids_are_refused(token_id: int) -> None:
    with pytest.raises(RequestError, match="is not a token id"):
        BYTE_LEVEL.decode([token_id])


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(RequestError, match="a lone surrogate at character 2"):
        BYTE_LEVEL.encode("ab\ud800")


def with_state(tmp_path: Path, **changes: Any) -> Tokenizer:
    """The byte-level tokenizer with parts of its file replaced."""
    write_json(tmp_path / "tokenizer.json", json.loads(byte_level_tokenizer().to_str()) | changes)
    return Tokenizer.load(tmp_path)


@pytest.mark.parametrize("max_tokens", [None, 2])
def test_a_text_on_which_the_library_panics_is_refused_and_the_next_is_served(
    tmp_path: Path, max_tokens: int | None
) -> None:
    """This pattern backtracks without end, and the regular-expression engine gives up by a panic."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = with_state(tmp_path, pre_tokenizer=split)
    with pytest.raises(RequestError, match="the model's tokenizer fails on this.*retry-limit") as caught:
        tokenizer.encode("a" * 37 + "b", max_tokens=max_tokens)
    assert caught.value.param == "prompt" and "\n" not in str(caught.value)
    assert tokenizer.decode(tokenizer.encode("fox")) == "fox"


USES: dict[str, Callable[[Tokenizer], object]] = {
    "encode": lambda tokenizer: tokenizer.encode("x"),
    "decode": lambda tokenizer: tokenizer.decode([5]),
    "stream": lambda tokenizer: tokenizer.stream().push(5),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("raised", [BaseException("a\npanic"), KeyboardInterrupt(), SystemExit()])
def test_panics_are_refused_and_interrupts_pass(use: str, raised: BaseException) -> None:
    class Failing:
        """Stands in for the library."""

        def encode(self, *_: Any, **__: Any) -> None:
            raise raised

        decode = encode

    tokenizer = Tokenizer(sentencepiece_like_tokenizer(), {})
    tokenizer._backend = tokenizer._plain = Failing()  # type: ignore[assignment]
    expected = RequestError if type(raised) is BaseException else type(raised)
    with pytest.raises(expected, check=lambda error: "\n" not in str(error)):
        USES[use](tokenizer)


@pytest.mark.parametrize("unit", ["a", "ab1!", "日", "the quick brown fox ", "\x00", "<|im_end|>"])
def test_fifty_megabytes_are_refused_without_being_encoded(unit: str) -> None:
    text = unit * (50_000_000 // len(unit.encode()))
    start = time.process_time()
    with pytest.raises(ContextTooLong, match="cannot fit the context of 2048 tokens") as caught:
        BYTE_LEVEL.encode(text, max_tokens=2048)
    assert caught.value.param == "prompt" and caught.value.code == "context_length_exceeded"
    assert time.process_time() - start < 3


@pytest.mark.parametrize("unit", ["a", " ", "fox", "日本"])
def test_a_long_text_without_spaces_stays_linear(unit: str) -> None:
    """400 kB that might just fit are encoded within seconds, not minutes."""
    text = unit * (400_000 // len(unit.encode()))
    start = time.process_time()
    assert len(BYTE_LEVEL.encode(text, max_tokens=400_000)) > 1000
    assert time.process_time() - start < 10


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(words=st.lists(st.sampled_from(["the ", "fox", "  ", "日本", "<|im_end|>"]), min_size=1, max_size=30))
def test_a_text_that_fits_is_never_refused(words: list[str]) -> None:
    text = "".join(words) * 2000
    n_tokens = len(BYTE_LEVEL.encode(text, special=True))
    assert len(BYTE_LEVEL.encode(text, special=True, max_tokens=n_tokens)) == n_tokens


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff\xfe", b'{"version":"1.0"}', b"[" * 100_000])
def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(CheckpointError, match="is not a tokenizer") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token_id", [2**22, 2**31 - 1])
def test_an_id_beyond_every_vocabulary_is_refused_at_once(tmp_path: Path, token_id: int) -> None:
    model = json.loads(byte_level_tokenizer().to_str())["model"]
    model["vocab"]["far"] = token_id
    start = time.process_time()
    with pytest.raises(
        CheckpointError, match=rf"token 'far' has id {token_id} \(give it an id below 4194304"
    ):
        with_state(tmp_path, model=model)
    assert time.process_time() - start < 2
    model["vocab"]["far"] = 2**22 - 1
    assert with_state(tmp_path, model=model).vocab_size == 2**22


def test_a_tokenizer_without_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json holds no tokens \(download it again"):
        with_state(tmp_path, model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[])


JUNK = st.sampled_from([None, 0, -1, 2**33, "", "x", [], {}, True, 1.5, ["x"], {"type": "BPE"}])


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mangled_tokenizer_works_or_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    state = json.loads(byte_level_tokenizer("<|endoftext|>").to_str())
    places = [(state, key) for key in state]
    for part in (state["model"], state["post_processor"], state["added_tokens"][1], state["decoder"]):
        places += [(part, key) for key in part]
    for holder, key in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=2)):
        holder[key] = data.draw(JUNK)
    write_json(tmp_path / "tokenizer.json", state)
    try:
        tokenizer = Tokenizer.load(tmp_path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        streamed(tokenizer, tokenizer.encode("the fox", special=True))


def test_a_missing_tokenizer_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no tokenizer\.json \(copy it there, or make it: .*save_pretrained"
    ):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"has no tokenizer\.json but tokenizer\.model.*save_pretrained"
    ):
        Tokenizer.load(tmp_path)


def test_truncation_and_padding_in_the_file_are_switched_off(tmp_path: Path) -> None:
    backend = byte_level_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("the quick brown fox")) == "the quick brown fox"
    assert len(tokenizer.encode("a")) == 1


def test_a_named_token_that_the_file_does_not_mark_is_special_all_the_same(tmp_path: Path) -> None:
    backend = byte_level_tokenizer()
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:2]
    write_json(tmp_path / "tokenizer.json", state)
    write_json(tmp_path / "special_tokens_map.json", {"eos_token": "<|im_end|>"})
    tokenizer = Tokenizer.load(tmp_path)
    assert "<|im_end|>" in tokenizer.special_tokens and tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.encode("<|im_end|>", special=True) == [2]


@pytest.mark.skipif(not (SHARED / "models/books-4m").exists(), reason="the shared models are not here")
def test_the_books_tokenizer_has_the_vocabulary_its_model_expects() -> None:
    tokenizer = Tokenizer.load(SHARED / "models/books-4m")
    assert tokenizer.vocab_size == 8192 and tokenizer.eos_token == "<|endoftext|>"
    text = "It was a dark and stormy night; naïve café."
    assert streamed(tokenizer, tokenizer.encode(text)) == text
