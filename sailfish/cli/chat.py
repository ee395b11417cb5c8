"""`sailfish chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys

import typer

from sailfish.base.errors import SailfishError
from sailfish.cli import opening
from sailfish.cli.options import ENGINE, SAMPLING, Download, Model, Offline, Settings, with_settings
from sailfish.engine.sync import Engine

_SAMPLING = tuple(setting for setting in SAMPLING if setting.field != "n")
_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer."


@with_settings(_SAMPLING, ENGINE)
def chat(
    model: Model,
    system: str = typer.Option(
        "", "--system", metavar="TEXT", help="The system message.", show_default=False
    ),
    offline: Offline = False,
    download: Download = False,
    *,
    settings: Settings,
) -> None:
    """Talk to a model. /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer."""
    engine_dir = opening.find(model, settings, offline=offline, download=download)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its history and editing keys
    beginning = [{"role": "system", "content": system}] if system else []
    with Engine(engine_dir, config=settings.engine) as engine:
        opening.say(_HELP)
        _converse(engine, beginning, settings)


def _converse(engine: Engine, beginning: list[dict[str, str]], settings: Settings) -> None:
    """Answer what is typed until its end; a turn that failed is forgotten, so that the next one can do."""
    messages = list(beginning)
    while (text := _read()) is not None:
        if text == "/reset":
            messages = list(beginning)
        elif text:
            messages.append({"role": "user", "content": text})
            answer = _answer(engine, messages, settings)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


def _read() -> str | None:
    try:
        text = input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    return None if text in ("/exit", "/quit") else text


def _answer(engine: Engine, messages: list[dict[str, str]], settings: Settings) -> str | None:
    """Print the answer as it comes; return what came of it, also when it was stopped, or None: it failed."""
    said = []
    try:
        for chunk in engine.stream_chat(messages, settings.sampling):
            said.append(chunk.text)
            typer.echo(chunk.text, nl=False)
    except KeyboardInterrupt:
        typer.echo(" (stopped)", nl=False)
    except SailfishError as error:
        if said:
            typer.echo()
        opening.say(f"error: {error}; this turn is forgotten, /reset forgets them all")
        return None
    typer.echo()
    return "".join(said)
