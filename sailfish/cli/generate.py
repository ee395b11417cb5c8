"""`sailfish generate`: a text continued in the terminal, or a batch of JSON lines."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from sailfish.base.errors import ConfigError
from sailfish.cli import batch, opening
from sailfish.cli.options import ENGINE, SAMPLING, Download, Model, Offline, Settings, with_settings
from sailfish.engine.sync import Engine


@with_settings(SAMPLING, ENGINE)
def generate(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="The text to continue; without it, or for -, standard input is read."
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="Read the prompt from a file.")
    ] = None,
    jsonl_in: Annotated[
        Path | None, typer.Option("--jsonl-in", metavar="FILE", help="Answer a batch: one request a line.")
    ] = None,
    jsonl_out: Annotated[
        Path | None,
        typer.Option("--jsonl-out", metavar="FILE", help="Where a batch's answers go, as they finish."),
    ] = None,
    offline: Offline = False,
    download: Download = False,
    *,
    settings: Settings,
) -> None:
    """Continue a prompt (argument, file or standard input) as a stream, or answer a batch of JSON lines.

    A batch's line is {"prompt": "It was"} or {"messages": [{"role": "user", "content": "Hello"}]}, with an
    "id" and sampling parameters ("max_tokens": 9) if need be. Answers carry the id, or else the request's
    number from 0. The exit status is 1 when a request failed.
    """
    if jsonl_in is None and jsonl_out is None:
        text = _prompt(prompt, file)
        engine_dir = opening.find(model, settings, offline=offline, download=download)
        with Engine(engine_dir, config=settings.engine) as engine:
            _show(engine, text, settings)
        return
    if jsonl_in is None or jsonl_out is None:
        raise ConfigError("--jsonl-in and --jsonl-out belong together", hint="give both")
    if prompt is not None or file is not None:
        raise ConfigError("a batch and another prompt were both given", hint="give --jsonl-in alone")
    requests = batch.read(jsonl_in)
    with batch.open_for_answers(jsonl_out, jsonl_in) as out:
        engine_dir = opening.find(model, settings, offline=offline, download=download)
        n_failed = asyncio.run(batch.answer_all(engine_dir, requests, out, settings))
    opening.say(f"requests: {len(requests) - n_failed} answered, {n_failed} failed; see {jsonl_out}")
    if n_failed:
        raise typer.Exit(1)


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise ConfigError("a prompt and --file were both given", hint="give one of them")
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"prompt file {file}: {error}") from error
    if prompt in (None, "-"):
        if sys.stdin.isatty():
            raise ConfigError(
                "there is no prompt", hint="give it as an argument, with --file, or on standard input"
            )
        return sys.stdin.read()
    return prompt or ""


def _show(engine: Engine, prompt: str, settings: Settings) -> None:
    if settings.sampling.n > 1:
        for completion in engine.generate(prompt, settings.sampling):
            typer.echo(f"[{completion.index}] {completion.text}")
        return
    start_s = time.perf_counter()
    first_s = 0.0
    n_tokens = 0
    for chunk in engine.stream(prompt, settings.sampling):
        first_s = first_s or time.perf_counter() - start_s
        n_tokens += len(chunk.token_ids)
        typer.echo(chunk.text, nl=False)
    typer.echo()
    opening.say(
        f"{n_tokens} tokens in {time.perf_counter() - start_s:.2f} s, the first after {first_s * 1e3:.0f} ms"
    )
