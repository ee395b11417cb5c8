"""Bodies that must be refused: each with the right status and code, and the next request is fine."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from fake_engine import CONTEXT_TOKENS, FakeEngine
from serving import Running

Start = Callable[..., Running]
TEXT = {"model": "fake", "prompt": "ab"}
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
JSON_TYPE = {"content-type": "application/json"}


def check_error(reply: Any, status: int, code: str, param: str | None = None) -> None:
    """Assert OpenAI's error shape with these values."""
    assert reply.status_code == status, reply.text[:500]
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    assert isinstance(error["message"], str) and len(error["message"]) <= 500 and "\n" not in error["message"]
    if param is not None:
        assert error["param"] == param, error
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"model": "fake", "prompt": "\xff\xfe"}', id="not UTF-8"),
        pytest.param(b'\xef\xbb\xbf{"model": "fake", "prompt": "a"}', id="byte order mark"),
        pytest.param(b'{"model": "fake", "prompt": "\\ud800"}', id="lone surrogate"),
        pytest.param(b'{"model": "fake", "prompt": "a\x00"}', id="raw NUL in a string"),
        pytest.param(b"[" * 100_000, id="deep array"),
        pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, id="deep object"),
        pytest.param(b'{"a":' * 33 + b"1" + b"}" * 33, id="one level too deep"),
        pytest.param(b'{"a": [' + b"[]," * 100_000 + b"[]]}", id="a hundred thousand arrays"),
        pytest.param(b'{"a": [' + b"1," * 2_000_000 + b"1]}", id="two million numbers"),
        pytest.param(b'{"model": "fake", "model": "fake", "prompt": "a"}', id="a key twice"),
        pytest.param(b'{"model": "fake", "prompt": "a", "temperature": NaN}', id="NaN"),
        pytest.param(b'{"model": "fake", "prompt": "a", "temperature": -Infinity}', id="Infinity"),
        pytest.param(b'{"model": "fake", "prompt": "a", "temperature": 1e400}', id="1e400"),
        pytest.param(b'{"model": "fake", "prompt": "a", "seed": ' + b"1" * 100_000 + b"}", id="long integer"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="array"),
        pytest.param(b'"text"', id="string"),
        pytest.param(b"", id="nothing"),
        pytest.param(b'{"model": "fake"', id="cut off"),
    ],
)
def test_a_body_that_is_no_proper_json_object_is_refused(shared: Running, body: bytes) -> None:
    with shared.client() as client:
        check_error(client.post("/v1/completions", content=body, headers=JSON_TYPE), 400, "invalid_json")
    assert shared.is_fine()


def test_32_levels_and_brackets_inside_strings_are_allowed(shared: Running) -> None:
    with shared.client() as client:
        nested: Any = 1
        for _ in range(31):
            nested = [nested]
        reply = client.post("/v1/completions", json={**TEXT, "prompt": nested})
        check_error(reply, 400, "invalid_type", "prompt")
        assert client.post("/v1/completions", json={**TEXT, "prompt": '[{"\\' * 500}).status_code == 200


def test_50_megabytes_of_text_are_413_before_any_tokenizer(shared: Running) -> None:
    with shared.client() as client:
        reply = client.post("/v1/completions", json={**TEXT, "prompt": "x" * 50_000_000})
    check_error(reply, 413, "request_too_large")
    assert shared.is_fine()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=latin-1"},
        {**JSON_TYPE, "content-encoding": "gzip"},
    ],
)
def test_what_is_not_plain_json_is_415(shared: Running, headers: dict[str, str]) -> None:
    with shared.client() as client:
        reply = client.post("/v1/completions", content=json.dumps(TEXT).encode(), headers=headers)
    assert reply.status_code == 415 and reply.json()["error"]["code"].startswith("unsupported_")
    assert shared.is_fine()


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    *[({"n": n}, "n") for n in (0, -1, 10**9, 1.5, "1", True)],
    ({"best_of": 3}, "best_of"),
    ({"best_of": 2, "n": 3}, "best_of"),
    *[({"max_tokens": n}, "max_tokens") for n in (0, -1, 2**63, 10**30, "5")],
    *[({"min_tokens": n}, "min_tokens") for n in (-1, 2**63)],
    *[({"temperature": t}, "temperature") for t in (-1, 2.1, "1", 10**400)],
    *[({"top_p": p}, "top_p") for p in (0, -1, 1.1)],
    *[({"min_p": p}, "min_p") for p in (-0.1, 1.1)],
    *[({name: p}, name) for name in ("presence_penalty", "frequency_penalty") for p in (-2.1, 2.1, "0")],
    *[({"repetition_penalty": p}, "repetition_penalty") for p in (0, -1, 10.5)],
    *[({"top_k": k}, "top_k") for k in (-2, 0, 2**31)],
    *[({"seed": s}, "seed") for s in (2**64, 0.5)],
    *[({"prompt_logprobs": k}, "prompt_logprobs") for k in (-1, 21, 10**6)],
    *[({"logit_bias": b}, "logit_bias") for b in ({"a": 1}, {"-1": 1}, {"258": 1}, {"99999999999": 1})],
    ({"logit_bias": {str(i): 1 for i in range(10**5)}}, "logit_bias"),
    *[({"stop": s}, "stop") for s in ("", ["a"] * 10**5, [""], "x" * 10**6, 5)],
    *[({"stop_token_ids": s}, "stop_token_ids") for s in ([258], list(range(65)))],
    *[({"deadline_s": s}, "deadline_s") for s in (0, -1, 10**9)],
    ({"priority": 10**6}, "priority"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"user": 5}, "user"),
    ({"metadata": {"a": 1}}, "metadata"),
]


def name_of(case: dict[str, Any]) -> str:
    return json.dumps(case)[:40]


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS, ids=[name_of(case[0]) for case in BAD_FIELDS])
def test_a_field_out_of_range_is_named(shared: Running, fields: dict[str, Any], param: str) -> None:
    with shared.client() as client:
        reply = client.post("/v1/completions", json={**TEXT, **fields})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].partition("[")[0] == param, reply.text
    assert shared.is_fine()


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [[]],
        [""],
        [-1],
        [258],
        [2**40],
        [[1], [-1]],
        ["a", 1],
        [1, "a"],
        [True],
        {"a": 1},
        7,
        None,
        ["a"] * 129,
    ],
    ids=name_of,
)
def test_a_bad_prompt_is_refused(shared: Running, prompt: Any) -> None:
    with shared.client() as client:
        reply = client.post("/v1/completions", json={**TEXT, "prompt": prompt})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "prompt"
    assert shared.is_fine()


def test_too_many_answers_in_all_are_refused(shared: Running) -> None:
    with shared.client() as client:
        reply = client.post("/v1/completions", json={**TEXT, "prompt": ["a"] * 100, "n": 3})
    check_error(reply, 400, "invalid_value", "n")


def test_more_answers_than_can_ever_be_at_work_are_no_reason_to_come_again(start: Start) -> None:
    engine = FakeEngine()
    engine.info = msgspec.structs.replace(engine.info, max_sequences=4, max_queue=4)
    with start(engine).client() as client:
        for fields, param, words in (
            ({"n": 9}, "n", "8 answers"),
            ({"prompt": ["a"] * 9}, "prompt", "8 answers"),
        ):
            reply = client.post("/v1/completions", json=TEXT | fields)
            check_error(reply, 400, "invalid_value", param)
            assert words in reply.json()["error"]["message"]
        assert client.post("/v1/completions", json=TEXT | {"n": 8}).status_code == 200


@pytest.mark.parametrize("prompt", [[97] * (CONTEXT_TOKENS + 1), "x" * CONTEXT_TOKENS])
def test_a_prompt_longer_than_the_context_has_openais_code(shared: Running, prompt: Any) -> None:
    with shared.client() as client:
        reply = client.post("/v1/completions", json={**TEXT, "prompt": prompt})
        check_error(reply, 400, "context_length_exceeded")
        reply = client.post("/v1/completions", json={**TEXT, "max_tokens": CONTEXT_TOKENS})
        check_error(reply, 400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ("x", "messages"),
        ([], "messages"),
        ([123], "messages[0]"),
        ([{"role": "wizard", "content": "a"}], "messages[0].role"),
        ([{"role": "tool", "content": "a"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [[["a"]]]}], "messages[0].content[0]"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "a", "contnet": "b"}], "messages[0].contnet"),
    ],
    ids=str,
)
def test_malformed_messages_are_named(shared: Running, messages: Any, param: str) -> None:
    with shared.client() as client:
        reply = client.post("/v1/chat/completions", json={**CHAT, "messages": messages})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param, reply.text
    assert shared.is_fine()


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/", "file:///etc/passwd", "http://a\\@b/", "data:image/png;base64,AAAA"]
)
@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_media_parts_are_refused_unfetched(shared: Running, kind: str, url: str) -> None:
    part = {"type": kind, kind: {"url": url}}
    with shared.client() as client:
        reply = client.post(
            "/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": [part]}]}
        )
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith("messages[0].content[0]")
    assert "169.254" not in reply.text and not any(kind in str(s) for s in shared.engine.submissions)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"functions": [{}]},
        {"response_format": {"type": "json_object"}},
        {"modalities": ["audio"]},
        {"audio": {"voice": "x"}},
        {"prediction": {}},
        {"reasoning_effort": "high"},
        {"web_search_options": {}},
        {"chat_template": "{{ 1 }}"},
    ],
    ids=name_of,
)
def test_a_feature_not_here_yet_is_refused_by_name(shared: Running, fields: dict[str, Any]) -> None:
    with shared.client() as client:
        reply = client.post("/v1/chat/completions", json={**CHAT, **fields})
    check_error(reply, 400, "unsupported_parameter", next(iter(fields)))


def test_fields_that_change_nothing_are_accepted(shared: Running) -> None:
    harmless = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "logprobs": None,
        "stop": None,
    }
    message = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None, "annotations": []}
    with shared.client() as client:
        reply = client.post("/v1/chat/completions", json={**CHAT, **harmless, "messages": [message]})
    assert reply.status_code == 200, reply.text


def test_an_unknown_field_is_answered_with_the_nearest_known_one(shared: Running) -> None:
    with shared.client() as client:
        reply = client.post("/v1/completions", json={**TEXT, "max_token": 5})
    check_error(reply, 400, "unknown_parameter", "max_token")
    assert "max_tokens" in reply.json()["error"]["message"]


def test_a_field_like_no_other_gets_no_hint_and_no_hint_names_what_is_not_here(shared: Running) -> None:
    with shared.client() as client:
        for name in ("zzz", "guided_json", "toolz"):
            reply = client.post("/v1/chat/completions", json={**CHAT, name: 5})
            check_error(reply, 400, "unknown_parameter", name)
            assert reply.json()["error"]["message"] == f"unknown field {name!r}"


def test_template_variables_are_plain_values(shared: Running) -> None:
    with shared.client() as client:
        reply = client.post("/v1/chat/completions", json={**CHAT, "chat_template_kwargs": {"a": [1]}})
    assert reply.status_code == 400


def test_the_cap_that_was_sent_is_the_one_that_is_named(shared: Running) -> None:
    with shared.client() as client:
        for caps, name in (
            ({"max_completion_tokens": 5000}, "max_completion_tokens"),
            ({"max_completion_tokens": 5000, "max_tokens": 6000}, "max_completion_tokens"),
            ({"max_completion_tokens": 6000, "max_tokens": 5000}, "max_tokens"),
            ({"max_tokens": 5000}, "max_tokens"),
        ):
            reply = client.post("/v1/chat/completions", json=CHAT | caps)
            check_error(reply, 400, "context_length_exceeded", name)


def test_nothing_to_generate_needs_an_echo(shared: Running) -> None:
    with shared.client() as client:
        check_error(
            client.post("/v1/completions", json=TEXT | {"max_tokens": 0}), 400, "invalid_value", "max_tokens"
        )
        reply = client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 0})
        assert reply.status_code == 400


@pytest.mark.parametrize("model", ["other", "../../etc/passwd", ""])
def test_an_unknown_model_is_404(shared: Running, model: str) -> None:
    with shared.client() as client:
        check_error(
            client.post("/v1/completions", json={**TEXT, "model": model}), 404, "model_not_found", "model"
        )
        assert client.get("/v1/models/..%2F..%2Fetc%2Fpasswd").status_code == 404
        check_error(
            client.post("/v1/completions", json={"prompt": "a"}), 400, "missing_required_parameter", "model"
        )


def test_top_logprobs_need_logprobs(shared: Running) -> None:
    with shared.client() as client:
        for k in (2, -1, 10**6):
            reply = client.post("/v1/chat/completions", json={**CHAT, "top_logprobs": k})
            assert reply.status_code == 400 and reply.json()["error"]["param"] == "top_logprobs"


def test_a_failure_of_ours_says_nothing_of_our_insides(start: Start) -> None:
    running = start(FakeEngine(fail_after=0))
    with running.client() as client:
        reply = client.post("/v1/completions", json=TEXT)
    check_error(reply, 500, "internal_error")
    assert "secret" not in reply.text and "/path" not in reply.text and "Traceback" not in reply.text


def test_routes_that_do_not_exist_answer_in_the_same_shape(shared: Running) -> None:
    with shared.client() as client:
        check_error(client.get("/nothing"), 404, "not_found")
        wrong_method = client.get("/v1/completions")
        check_error(wrong_method, 405, "method_not_allowed")
        assert wrong_method.headers["allow"] == "POST"
