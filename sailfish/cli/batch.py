"""Batches of JSON lines: read requests, answer them side by side, write each answer as it comes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, TextIO

import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sailfish.base.errors import ConfigError, RequestError, SailfishError
from sailfish.cli.options import Settings
from sailfish.engine.api import Completion, SamplingParams
from sailfish.engine.client import AsyncEngine

_SAMPLING = set(SamplingParams.__struct_fields__)
_KNOWN = _SAMPLING | {"id", "prompt", "messages"}


async def answer_file(engine_dir: Path, source: Path, target: Path, settings: Settings) -> None:
    """Answer every line of `source` into `target`, one JSON object an answer, in the order they finish.

    A line is `{"prompt": ...}` or `{"messages": [...]}`, with an optional `id` and sampling parameters
    that replace those of the command line. A line that fails becomes `{"id", "error"}`.
    """
    requests = read(source)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _open(target) as out, Progress(*columns, console=_stderr()) as progress:
        bar = progress.add_task(source.name, total=len(requests))
        async with await AsyncEngine.start(engine_dir, config=settings.engine) as engine:
            places = asyncio.Semaphore(engine.info.max_sequences)

            async def answer(number: int, request: dict[str, Any]) -> None:
                async with places:
                    for row in await _answer(engine, number, request, settings.sampling):
                        out.write(msgspec.json.encode(row).decode() + "\n")
                progress.advance(bar)

            await asyncio.gather(*(answer(i, request) for i, request in enumerate(requests)))


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
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"requests {source}: {error}") from error
    requests = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            request = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ConfigError(f"{source}, line {number}: {error}") from error
        reason = _rejects(request)
        if reason is not None:
            raise ConfigError(f"{source}, line {number}: {reason}")
        requests.append(request)
    return requests


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


def _open(target: Path) -> TextIO:
    try:
        return target.open("w", encoding="utf-8", buffering=1)
    except OSError as error:
        raise ConfigError(f"{target}: {error.strerror}") from error


def _stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True)
