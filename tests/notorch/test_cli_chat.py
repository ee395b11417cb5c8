"""The conversation in the terminal: what the engine is told, turn by turn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sailfish.base.config import EngineConfig, ServeConfig
from sailfish.base.errors import ContextTooLong
from sailfish.cli import chat
from sailfish.cli.options import Settings
from sailfish.engine.api import Chunk, SamplingParams

SETTINGS = Settings(engine=EngineConfig(), serve=ServeConfig(), sampling=SamplingParams(), origins={})
BEGINNING = [{"role": "system", "content": "Be brief."}]


class Short:
    """An engine that answers "yes", and refuses conversations of more than 40 characters."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def stream_chat(self, messages: list[dict[str, str]], _: SamplingParams) -> Iterator[Chunk]:
        self.asked.append([message["content"] for message in messages])
        if len("".join(self.asked[-1])) > 40:
            raise ContextTooLong("41 tokens do not fit into a context of 40")
        yield Chunk(index=0, text="ye", token_ids=[1])
        yield Chunk(index=0, text="s", token_ids=[2], finish_reason="stop")


def _typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> list[list[str]]:
    """Return what the engine was asked while these lines were typed."""
    waiting = iter(lines)

    def next_line(_: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", next_line)
    engine = Short()
    chat._converse(engine, BEGINNING, SETTINGS)  # type: ignore[arg-type]
    return engine.asked


def test_a_turn_knows_those_before_it_until_they_are_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _typed(monkeypatch, "One?", " ", "Two?", "/reset", "Three?", "/exit", "Four?") == [
        ["Be brief.", "One?"],
        ["Be brief.", "One?", "yes", "Two?"],
        ["Be brief.", "Three?"],
    ]


def test_a_turn_that_failed_is_forgotten_and_the_conversation_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = _typed(monkeypatch, "One?", "x" * 40, "Two?")
    assert asked[-1] == ["Be brief.", "One?", "yes", "Two?"]
    said = capsys.readouterr()
    assert said.out == "yes\nyes\n"
    assert said.err.startswith("error: 41 tokens do not fit into a context of 40")
    assert "/reset" in said.err and said.err.count("\n") == 1
