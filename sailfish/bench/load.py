"""One process that holds many streams of completions open, and reports when their bytes came."""

from __future__ import annotations

import asyncio
import sys
import time
import urllib.parse

import msgspec

_EVENT, _END = b"data: ", b"\r\n0\r\n\r\n"
_USAGE = b'"completion_tokens":'
_READ_BYTES = 1 << 16
_PROMPT_TOKENS = 32


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What a load process is to do."""

    url: str
    model: str
    streams: int
    n_out: int
    vocab_size: int
    seed: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a load process saw, times by the system's monotonic clock."""

    started_s: float
    ended_s: float
    n_tokens: int
    n_events: int
    n_bytes: int
    first_s: list[float]
    """From request to first event, of each stream."""
    gap_s: list[float]
    """Between one read that brought events and the next, of all streams."""
    failures: list[str]


class _Stream:
    """One request on a connection of its own."""

    def __init__(self) -> None:
        self.n_tokens = self.n_events = self.n_bytes = 0
        self.first_s = 0.0
        self.gap_s: list[float] = []
        self.failure = ""

    async def run(self, host: str, port: int, request: bytes) -> None:
        """Send the request and read its answer to the end."""
        reader, writer = await asyncio.open_connection(host, port, limit=_READ_BYTES)
        try:
            writer.write(request)
            sent_s = last_s = time.monotonic()
            tail = b""
            while data := await reader.read(_READ_BYTES):
                now_s = time.monotonic()
                self.n_bytes += len(data)
                seen = tail + data
                n_events = seen.count(_EVENT) - tail.count(_EVENT)
                if n_events:
                    if self.n_events:
                        self.gap_s.append(now_s - last_s)
                    else:
                        self.first_s = now_s - sent_s
                    self.n_events += n_events
                    last_s = now_s
                if seen.endswith(_END):
                    self._finish(seen)
                    return
                tail = seen[-1024:]
            self.failure = f"the connection ended early, after {tail[-200:]!r}"
        except OSError as error:
            self.failure = str(error)
        finally:
            writer.close()

    def _finish(self, seen: bytes) -> None:
        at = seen.rfind(_USAGE)
        if b"data: [DONE]" not in seen or at < 0:
            self.failure = f"the answer ended with {seen[-200:]!r}"
            return
        digits = seen[at + len(_USAGE) : at + len(_USAGE) + 12].lstrip()
        self.n_tokens = int(digits.split(b",")[0].split(b"}")[0])


async def load(task: Task) -> Report:
    """Open all streams at once and read each to its end."""
    parts = urllib.parse.urlsplit(task.url)
    host, port = parts.hostname or "", parts.port or 80
    streams = [_Stream() for _ in range(task.streams)]
    started_s = time.monotonic()
    await asyncio.gather(*(stream.run(host, port, _request(task, i)) for i, stream in enumerate(streams)))
    return Report(
        started_s=started_s,
        ended_s=time.monotonic(),
        n_tokens=sum(stream.n_tokens for stream in streams),
        n_events=sum(stream.n_events for stream in streams),
        n_bytes=sum(stream.n_bytes for stream in streams),
        first_s=[stream.first_s for stream in streams],
        gap_s=[gap_s for stream in streams for gap_s in stream.gap_s],
        failures=[stream.failure for stream in streams if stream.failure],
    )


def _request(task: Task, i: int) -> bytes:
    number = task.seed + i
    prompt = [(number * 7919 + 31 * k) % (task.vocab_size - 8) + 8 for k in range(_PROMPT_TOKENS)]
    body = msgspec.json.encode(
        {
            "model": task.model,
            "prompt": prompt,
            "max_tokens": task.n_out,
            "temperature": 0.8,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def main() -> None:
    """Do the task that one line of standard input names, report on standard output."""
    task = msgspec.json.decode(sys.stdin.buffer.readline(), type=Task)
    report = asyncio.run(load(task))
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
