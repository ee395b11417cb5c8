"""The walk: every function that one plain streamed request enters, from HTTP to the kernel and back."""

from __future__ import annotations

import http.client
import json
import tempfile
import time
import urllib.parse
from pathlib import Path

from sailfish.base import trace
from sailfish.base.errors import EngineError
from sailfish.bench.server import ServerProcess

MAX_LINES = 3000
_SEALED = "checkpoint/template_worker.py"
_LAST_S = 0.05
"""The server closes an answer after its client has read it."""
_OF_THE_CLOCK = frozenset({"_serve", "run", "ApiServer.run_on", "ApiServer.on_tick"})
"""Woken ten times a second while a server lives, whoever asks: only a slow request would count them."""
_WARM_UP, _MEASURED = "Once upon a time", "It was a dark and stormy night"


def walk(model: str, *, chat: bool = True) -> list[trace.Entered]:
    """Serve a model, send one warm-up and one traced streamed request, and return what the latter entered."""
    with tempfile.TemporaryDirectory(prefix="sailfish-walk-") as folder:
        trace_dir = Path(folder)
        switch = trace.Switch(trace_dir)
        with ServerProcess(model, "--trace-to", folder) as server:
            name = json.loads(_exchange(server.url, "GET", "/v1/models"))["data"][0]["id"]
            _ask(server.url, name, _WARM_UP, chat)
            switch.turn(True)
            _ask(server.url, name, _MEASURED, chat)
            time.sleep(_LAST_S)
            switch.turn(False)
        entered = [row for row in trace.read(trace_dir) if not _is_of_the_clock(row)]
        return _with_sealed(entered) if chat else entered


def _is_of_the_clock(row: trace.Entered) -> bool:
    return row.file in ("serve/server.py", "cli/serving.py") and row.function in _OF_THE_CLOCK


def _with_sealed(entered: list[trace.Entered]) -> list[trace.Entered]:
    """Add the process that renders chat templates: sealed off from tracing, so its whole file counts."""
    n_lines = len((Path(trace.PACKAGE_DIR) / _SEALED).read_text(encoding="utf-8").splitlines())
    asks = [row.at_ns for row in entered if row.file == "checkpoint/template.py"]
    whole = trace.Entered(
        at_ns=max(asks), file=_SEALED, first_line=1, last_line=n_lines, function="(sealed process: all of it)"
    )
    return sorted([*entered, whole])


def _ask(url: str, model: str, text: str, chat: bool) -> None:
    """Send one streamed request and read its answer to the end."""
    prompt = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    body = {"model": model, "max_tokens": 8, "stream": True, **prompt}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    answer = _exchange(url, "POST", path, json.dumps(body))
    if not answer.rstrip().endswith("data: [DONE]"):
        raise EngineError(f"the traced request did not end well: {answer[-200:]!r}")


def _exchange(url: str, method: str, path: str, body: str | None = None) -> str:
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        return connection.getresponse().read().decode()
    finally:
        connection.close()
