"""Many concurrent streams through HTTP: what the API side carries, with a paced engine or a real one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sailfish.artifact.reader import Artifact
from sailfish.base.errors import EngineError
from sailfish.bench.child import child
from sailfish.bench.load import Report, Task
from sailfish.bench.replay import percentile
from sailfish.bench.server import ServerProcess

_STREAMS_PER_LOAD = 256
"""A load process that holds more would itself be slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server under load."""

    url: str
    api_pids: tuple[int, ...] = ()
    """Its API processes, where they are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """What one run of all streams gave."""

    tokens_per_s: float
    tokens_per_event: float
    """Above 1 where deltas were joined because the API side, or the network, was behind."""
    first_ms: tuple[float, ...]
    gap_ms: tuple[float, ...]
    api_us_per_token: float | None
    """Processor time of all API processes."""

    def figures(self) -> Iterator[tuple[str, float, str]]:
        """Yield (name, value, unit)."""
        yield "output", self.tokens_per_s, "tokens/s"
        yield "tokens an event", self.tokens_per_event, "tokens"
        yield "ttft p50", percentile(self.first_ms, 50), "ms"
        yield "ttft p99", percentile(self.first_ms, 99), "ms"
        yield "gap p50", percentile(self.gap_ms, 50), "ms"
        yield "gap p99", percentile(self.gap_ms, 99), "ms"
        if self.api_us_per_token is not None:
            yield "API processor time a token", self.api_us_per_token, "us"


@contextlib.contextmanager
def paced_server(engine_dir: Path, n_processes: int, n_sequences: int, step_ms: float) -> Iterator[Server]:
    """Serve an engine whose steps take `step_ms` whatever they hold; its tokens mean nothing."""
    with tempfile.TemporaryDirectory(prefix="sailfish-") as folder:
        socket_path = Path(folder) / "engine.sock"
        flags = [
            *("--engine", str(engine_dir), "--socket", str(socket_path)),
            *("--sequences", str(n_sequences), "--step-ms", str(step_ms)),
        ]
        with (
            child("sailfish.bench.paced", *flags),
            child("sailfish.bench.rig", str(socket_path), str(n_processes)) as said,
        ):
            url, *pids = said.words
            yield Server(url=url, api_pids=tuple(map(int, pids)))


@contextlib.contextmanager
def real_server(model: str, n_processes: int, flags: Sequence[str]) -> Iterator[Server]:
    """Serve a model as `sailfish serve` does."""
    with ServerProcess(model, "--api-processes", str(n_processes), *flags) as server:
        yield Server(url=server.url)


def carry(server: Server, engine_dir: Path, n_streams: int, n_out: int, seed: int) -> Carried:
    """Hold `n_streams` streams of `n_out` tokens each open at once, and sum up what came."""
    manifest = Artifact.open(engine_dir).manifest
    n_loads = -(-n_streams // _STREAMS_PER_LOAD)
    tasks = [
        Task(
            url=server.url,
            model=manifest.name,
            streams=len(range(i, n_streams, n_loads)),
            n_out=n_out,
            vocab_size=manifest.model.vocab_size,
            seed=(seed * n_loads + i) * n_streams,
        )
        for i in range(n_loads)
    ]
    before_s = _processor_s(server.api_pids)
    reports = _run(tasks)
    used_s = _processor_s(server.api_pids) - before_s
    failures = [failure for report in reports for failure in report.failures]
    if failures:
        raise EngineError(f"{len(failures)} of {n_streams} streams failed: {failures[0]}")
    n_tokens = sum(report.n_tokens for report in reports)
    total_s = max(report.ended_s for report in reports) - min(report.started_s for report in reports)
    n_closing = 2 * n_streams  # the usage and [DONE] carry no token
    return Carried(
        tokens_per_s=n_tokens / total_s,
        tokens_per_event=n_tokens / (sum(report.n_events for report in reports) - n_closing),
        first_ms=tuple(first_s * 1e3 for report in reports for first_s in report.first_s),
        gap_ms=tuple(gap_s * 1e3 for report in reports for gap_s in report.gap_s),
        api_us_per_token=used_s / n_tokens * 1e6 if server.api_pids else None,
    )


def _run(tasks: Sequence[Task]) -> list[Report]:
    command = [sys.executable, "-m", "sailfish.bench.load"]
    pipe = subprocess.PIPE
    loads = [subprocess.Popen(command, stdin=pipe, stdout=pipe) for _ in tasks]
    for load, task in zip(loads, tasks, strict=True):
        assert load.stdin is not None
        load.stdin.write(msgspec.json.encode(task) + b"\n")
        load.stdin.close()
        load.stdin = None
    said = [load.communicate()[0] for load in loads]
    if any(load.returncode for load in loads):
        raise EngineError("a load process failed", hint="see what it wrote above")
    return [msgspec.json.decode(line, type=Report) for line in said]


def _processor_s(pids: Sequence[int]) -> float:
    """Return the processor time that processes have taken, in user and in system mode."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
