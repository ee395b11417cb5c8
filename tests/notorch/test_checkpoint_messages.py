"""A conversation's messages below HTTP: what is read, and what is refused by the name of its field."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, cast

import pytest

from sailfish.base.errors import RequestError
from sailfish.checkpoint.messages import read_messages
from sailfish.engine.api import EngineInfo
from sailfish.engine.client import AsyncEngine

IMAGE = {"type": "image_url", "image_url": {"url": "https://images.test/cat.png"}}


@pytest.mark.parametrize(
    ("messages", "param", "code"),
    [
        ("hello", "messages", "invalid_type"),
        (None, "messages", "invalid_type"),
        ([], "messages", "invalid_value"),
        (["hello"], "messages[0]", "invalid_type"),
        ([{"role": "wizard", "content": "a"}], "messages[0].role", "invalid_value"),
        ([{"role": "tool", "content": "a"}], "messages[0].role", "invalid_value"),
        ([{"content": "a"}], "messages[0].role", "missing_required_parameter"),
        ([{"role": "user", "content": {"text": "a"}}], "messages[0].content", "invalid_type"),
        ([{"role": "user", "content": None}], "messages[0].content", "invalid_type"),
        ([{"role": "user", "content": []}], "messages[0].content", "invalid_value"),
        ([{"role": "user", "content": "a", "images": ["x"]}], "messages[0].images", "unknown_parameter"),
        ([{"role": "user", "content": "a", 5: "x"}], "messages[0].5", "unknown_parameter"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{}]}],
            "messages[1].tool_calls",
            "unsupported_parameter",
        ),
    ],
    ids=str,
)
def test_what_is_no_message_is_refused_by_the_name_of_its_field(messages: Any, param: str, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_messages(messages)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert param in str(caught.value)


def test_a_picture_is_refused_without_its_address() -> None:
    with pytest.raises(RequestError) as caught:
        read_messages([{"role": "user", "content": [{"type": "text", "text": "What?"}, IMAGE]}])
    assert str(caught.value).startswith("messages[0].content[1]")
    assert "images.test" not in str(caught.value)


def test_a_template_sees_plain_roles_and_texts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = (
        {"role": "developer", "content": "Be brief."},
        MappingProxyType({"role": "user", "content": parts, "name": "Ann"}),
        {"role": "assistant", "content": "", "tool_calls": None, "annotations": []},
    )
    seen = [message.for_template() for message in read_messages(messages)]
    assert seen == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb", "name": "Ann"},
        {"role": "assistant", "content": ""},
    ]
    assert [message.for_template() for message in read_messages(seen)] == seen


def test_an_engine_whose_model_has_no_template_refuses_conversations_by_a_code_of_its_own() -> None:
    engine = AsyncEngine(Path("nowhere"), None)
    engine.info, engine.template = cast(EngineInfo, SimpleNamespace(name="bare")), None
    with pytest.raises(RequestError, match="'bare' has no chat template") as refused:
        asyncio.run(engine.encode_chat([{"role": "user", "content": "Hi"}]))
    assert (refused.value.code, refused.value.param) == ("no_chat_template", "messages")
