"""Batches of JSON lines: read requests, answer them side by side, write each answer as it comes."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from typing import Any, TextIO

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sailfish.base.errors import ConfigError, RequestError, SailfishError
from sailfish.cli.options import Settings
from sailfish.engine.api import Completion, SamplingParams
from sailfish.engine.client import AsyncEngine
from sailfish.engine.pace import Pace

_SAMPLING = set(SamplingParams.__struct_fields__)
_KNOWN = _SAMPLING | {"id", "prompt", "messages"}


async def answer_all(
    engine_dir: Path, requests: list[dict[str, Any]], out: TextIO, settings: Settings
) -> int:
    """Answer every request into `out`, one JSON object an answer, in the order they finish.

    A request is `{"prompt": ...}` or `{"messages": [...]}`, with an optional `id` and sampling parameters
    that replace those of the command line. One that fails becomes `{"id", "error"}`; returns how many did.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("requests", total=len(requests))
        async with await AsyncEngine.start(engine_dir, config=settings.engine) as engine:
            if stat.S_ISREG(os.fstat(out.fileno()).st_mode):
                out.truncate(0)  # only now, that there will be new answers
            pace = Pace(engine.info.max_sequences)

            async def answer(number: int, request: dict[str, Any]) -> bool:
                async with pace.places(_n_answers(request, settings.sampling)):
                    rows = await _answer(engine, number, request, settings.sampling)
                for row in rows:
                    out.write(msgspec.json.encode(row).decode() + "\n")
                progress.advance(bar)
                return "error" not in rows[0]

            answered = await asyncio.gather(*(answer(i, request) for i, request in enumerate(requests)))
    return answered.count(False)


async def _answer(
    engine: AsyncEngine, number: int, request: dict[str, Any], defaults: SamplingParams
) -> list[dict[str, Any]]:
    name = request.get("id", number)
    try:
        params = params_of(request, defaults)
        if "messages" in request:
            completions = await engine.chat(request["messages"], params)
        else:
            completions = await engine.generate(request["prompt"], params)
    except SailfishError as error:
        return [{"id": name, "error": {"code": error.code, "message": str(error)}}]
    return [_row(name, completion) for completion in completions]


def _n_answers(request: dict[str, Any], defaults: SamplingParams) -> int:
    """Return how many answers a request asks for; a wrong number is refused when it is submitted."""
    n = request.get("n", defaults.n)
    return n if isinstance(n, int) and n > 0 else 1


def _row(name: Any, completion: Completion) -> dict[str, Any]:
    return {
        "id": name,
        "index": completion.index,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "usage": msgspec.to_builtins(completion.usage),
    }


def params_of(request: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    """Return a line's sampling parameters over the command line's; raises RequestError on a wrong type."""
    given = {name: value for name, value in request.items() if name in _SAMPLING}
    try:
        return msgspec.convert(msgspec.to_builtins(defaults) | given, SamplingParams)
    except msgspec.ValidationError as error:
        raise RequestError(f"sampling parameters: {error}") from error


def read(source: Path) -> list[dict[str, Any]]:
    """Return the requests of a file; raises ConfigError naming the first line that is none."""
    try:
        lines = source.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"requests {source}: {error.strerror}") from error
    requests = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            request = msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source}, line {number}: {error}") from error
        reason = _rejects(request)
        if reason is not None:
            raise ConfigError(f"{source}, line {number}: {reason}")
        requests.append(request)
    return requests


def open_for_answers(target: Path, source: Path) -> TextIO:
    """Open the file of answers, what it holds still in it; raises ConfigError when that is the requests."""
    if target.is_file() and target.samefile(source):
        raise ConfigError(f"{target} holds the requests", hint="write the answers to another file")
    try:
        return target.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise ConfigError(f"answers {target}: {error.strerror}") from error


def _rejects(request: dict[str, Any]) -> str | None:
    """Return why a line is no request, or None."""
    unknown = sorted(set(request) - _KNOWN)
    if unknown:
        return f"unknown field {unknown[0]!r}"
    if ("prompt" in request) == ("messages" in request):
        return "it needs either prompt or messages"
    try:
        msgspec.convert(request.get("prompt", ""), str | list[int])
        msgspec.convert(request.get("messages", []), list[dict[str, Any]])
    except msgspec.ValidationError as error:
        return f"prompt is text or token ids, messages are objects: {error}"
    return None
