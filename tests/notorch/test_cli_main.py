"""The command line's edge: spellings, one-line errors, exit codes."""

from __future__ import annotations

import importlib
import inspect
import sys

import pytest
import typer

from sailfish.base.errors import ConfigError, EngineError, PlanError, UserError
from sailfish.cli import aliases, errors
from sailfish.cli.main import COMMANDS, application, main


def _run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sailfish", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_foreign_spellings_become_ours_with_and_without_an_equals_sign() -> None:
    assert aliases.translate(["serve", "m", "--max-model-len", "4k"]) == ["serve", "m", "--ctx", "4k"]
    assert aliases.translate(["--max-num-seqs=8"]) == ["--concurrency=8"]


def test_words_after_a_double_dash_are_left_alone() -> None:
    assert aliases.translate(["generate", "--", "--ctx-size"]) == ["generate", "--", "--ctx-size"]


@pytest.mark.parametrize("spelling", aliases.REFUSED)
def test_a_spelling_without_a_meaning_here_is_refused_with_what_to_do(spelling: str) -> None:
    with pytest.raises(ConfigError) as caught:
        aliases.translate(["serve", "m", spelling])
    assert spelling in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("wrong"), 2),
        (PlanError("too big", hint="use less"), 2),
        (EngineError("broke"), 4),
        (OSError(28, "No space left on device"), 1),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, errors.shown(debug=False):
        raise error
    said = capsys.readouterr().err
    assert caught.value.code == status
    assert said == f"error: {error}\n"


def test_debug_lets_the_traceback_through() -> None:
    with pytest.raises(UserError), errors.shown(debug=True):
        raise UserError("wrong")


def test_a_mistyped_command_is_told_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "serv") == 2
    assert "'serve'" in capsys.readouterr().err


def test_version_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(monkeypatch, "--version") == 0
    flag = capsys.readouterr().out.split()[-1]
    assert _run(monkeypatch, "version") == 0
    assert capsys.readouterr().out.strip() == flag


def test_a_refused_flag_reaches_the_terminal_as_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "serve", "m", "--trust-remote-code") == 2
    assert capsys.readouterr().err.startswith("error: --trust-remote-code is not a flag")


def test_every_command_is_listed_and_only_the_named_one_is_loaded() -> None:
    app = application(["version"])
    assert [command.name for command in app.registered_commands] == list(COMMANDS)


@pytest.mark.parametrize("port", ["99999", "-1", "http"])
def test_a_port_that_cannot_be_is_refused_before_anything_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], port: str
) -> None:
    assert _run(monkeypatch, "doctor", "--port", port) == 2
    assert "Invalid value for '--port'" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_is_its_own_words_and_the_list_has_the_short_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert _run(monkeypatch, name, "--help") == 0
    help_text = " ".join(capsys.readouterr().out.split())
    command = getattr(importlib.import_module(f"sailfish.cli.{name}"), name)
    words = command.info.help if isinstance(command, typer.Typer) else inspect.getdoc(command)
    assert " ".join((words or "").split()) in help_text
    assert _run(monkeypatch, "--help") == 0
    assert f"  {name.ljust(8)}  {COMMANDS[name]}\n" in capsys.readouterr().out
