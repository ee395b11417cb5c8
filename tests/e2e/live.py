"""Looks at a live server from outside: its metrics, its processes, its streams."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

WAIT_S = 300.0
"""How long anything may take on a slow and busy machine; only what fails takes so long."""
# verify=False: to read the certificates that plain HTTP needs none of takes 30 ms a client.
SMALL = ("--ctx", "512", "--concurrency", "8", "--step-tokens", "64", "--kv-memory", "8MiB")
"""Flags of a server that is soon ready."""
COMMAND = (sys.executable, "-m", "sailfish.cli.main")
_pause = threading.Event()


def typed(*words: str, cwd: Path, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run `sailfish WORDS...` in a folder with a standard input, and return what became of it."""
    return subprocess.run(
        [*COMMAND, *words],
        cwd=cwd,
        input=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * WAIT_S,
    )


def until(holds: Callable[[], Any], what: str, within_s: float = WAIT_S) -> Any:
    """Wait until something holds and return it; fail once it took too long."""
    ends_at_s = time.monotonic() + within_s
    while not (found := holds()):
        assert time.monotonic() < ends_at_s, f"not within {within_s} s: {what}"
        _pause.wait(0.02)
    return found


def metrics(url: str) -> dict[str, float]:
    """Return every sample, summed over labels; and under `name:value` for each label value alone."""
    samples: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(
        httpx.get(f"{url}/metrics", timeout=WAIT_S, verify=False).text
    ):
        for sample in family.samples:
            samples[sample.name] += sample.value
            for value in sample.labels.values():
                samples[f"{sample.name}:{value}"] += sample.value
    return samples


def is_idle(url: str) -> bool:
    """Tell whether nothing runs, waits or holds a block."""
    seen = metrics(url)
    names = ("sailfish_running_sequences", "sailfish_waiting_sequences", "sailfish_kv_used_blocks")
    return not any(seen[name] for name in names)


def descendants(pid: int, module: str) -> list[psutil.Process]:
    """Return the live processes below one that run a module."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if is_alive(child) and module in child.cmdline()]


def engine_of(pid: int) -> psutil.Process:
    """Return the engine process of a server."""
    return until(lambda: descendants(pid, "sailfish.engine.worker"), "an engine process runs")[0]


def is_alive(process: psutil.Process) -> bool:
    """Tell whether a process runs: a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def anonymous_bytes(pid: int) -> int:
    """Return the memory a process holds that is no page of a file."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc")


def ready_reason(url: str) -> str:
    """Return why a server is not ready; nothing when it is."""
    reply = httpx.get(f"{url}/readyz", timeout=WAIT_S, verify=False)
    return "" if reply.status_code == 200 else str(reply.json()["error"]["message"])


def ask(url: str, prompt: str = "It was a dark", **fields: Any) -> httpx.Response:
    """Send one greedy completion request and return the reply."""
    body = {"model": "books-4m", "prompt": prompt, "max_tokens": 12, "temperature": 0, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=WAIT_S, verify=False)


@dataclass
class Streamed:
    """All that came of one streamed request."""

    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    finishes: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    errors: list[dict[str, Any]] = field(default_factory=list)
    n_done: int = 0
    after_end: int = 0
    """Events that came after the last word."""

    def take(self, line: str) -> None:
        """Take one line of the reply."""
        if not line.startswith("data: "):
            assert not line or line.startswith(":"), line
            return
        self.after_end += bool(self.n_done or self.errors)
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            self.n_done += 1
            return
        event = json.loads(data)
        if "error" in event:
            self.errors.append(event["error"])
            return
        for choice in event["choices"]:
            index = choice["index"]
            assert not self.finishes[index], "news after a choice's end"
            self.texts[index] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            if choice["finish_reason"] is not None:
                self.finishes[index].append(choice["finish_reason"])

    def check(self, n: int) -> None:
        """Assert one final word for each of `n` choices and one for the stream; or one error."""
        assert self.after_end == 0
        if self.errors:
            assert (len(self.errors), self.n_done) == (1, 0)
            return
        assert self.n_done == 1
        assert {index: len(ends) for index, ends in self.finishes.items()} == dict.fromkeys(range(n), 1)


@dataclass
class Running:
    """A streamed request at work in a thread of its own."""

    url: str
    fields: dict[str, Any]
    streamed: Streamed = field(default_factory=Streamed)
    status: int = 0
    refusal: dict[str, Any] = field(default_factory=dict)
    is_cut: bool = False
    """The connection broke before the reply was whole."""
    began: threading.Event = field(default_factory=threading.Event)
    """Set with the first token, or with the end."""

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        body = {"model": "books-4m", "prompt": "It was", "temperature": 0, "stream": True, "ignore_eos": True}
        try:
            with httpx.stream(
                "POST", f"{self.url}/v1/completions", json=body | self.fields, timeout=WAIT_S, verify=False
            ) as reply:
                self.status = reply.status_code
                if self.status != 200:
                    self.refusal = json.loads(reply.read())["error"]
                    return
                for line in reply.iter_lines():
                    self.streamed.take(line)
                    if self.streamed.texts:
                        self.began.set()
        except httpx.TransportError:
            self.is_cut = True
        finally:
            self.began.set()

    def result(self) -> Streamed:
        """Wait for the end."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "a stream does not end"
        assert not self.is_cut, "a stream broke off"
        return self.streamed


def streams(url: str, count: int, **fields: Any) -> list[Running]:
    """Start streams and return once each has its first token."""
    running = [Running(url, {"max_tokens": 400, "seed": i, **fields}) for i in range(count)]
    for stream in running:
        assert stream.began.wait(WAIT_S), "a stream does not begin"
    return running
