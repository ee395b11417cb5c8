"""The engine process: `python -m sailfish.engine.worker`. The only process that holds torch and weights."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from sailfish.base import log as logs
from sailfish.base import trace
from sailfish.base.config import EngineConfig
from sailfish.base.errors import SailfishError
from sailfish.base.sources import environment
from sailfish.engine.api import EngineInfo
from sailfish.engine.boot import Booted, boot
from sailfish.engine.endpoint import Endpoint
from sailfish.engine.launch import Failed, Progress, Ready
from sailfish.engine.limits import SchedulerLimits
from sailfish.engine.loop import EngineLoop
from sailfish.engine.scheduler import Scheduler
from sailfish.hardware.memory import cuda_memory, resident_bytes
from sailfish.plan.formats import words

log = logging.getLogger("sailfish.engine.worker")

_EXIT_GRACE_S = 5.0
_BORN_S = time.monotonic()


def main() -> int:
    """Start, say READY on standard output, serve until told to stop; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--name")
    parser.add_argument("--drain-s", type=float, default=30.0)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-json", action="store_true")
    parser.add_argument("--trace-to", type=Path)
    args = parser.parse_args()
    logs.configure(level=args.log_level, as_json=args.log_json)
    serving: list[EngineLoop] = []
    threading.Thread(target=_end_with_parent, args=(serving, args.socket), daemon=True).start()
    if args.trace_to is not None:
        trace.start(args.trace_to)
    try:
        config = msgspec.json.decode(args.config, type=EngineConfig)
        booted = boot(args.engine, config, environment(), _report)
    except SailfishError as error:
        _say(Failed(error.code, error.message, error.hint))
        return error.exit_code
    except torch.OutOfMemoryError as error:
        _say(Failed("does_not_fit", f"the device ran out of memory while loading: {str(error)[:200]}"))
        return 2
    _serve(booted, args, serving)
    return 0


def _serve(booted: Booted, args: argparse.Namespace, serving: list[EngineLoop]) -> None:
    plan, artifact = booted.plan, booted.artifact
    scheduler = Scheduler(SchedulerLimits.of(plan), engine_digest=artifact.digest, kv_dtype=plan.kv_dtype)
    started_s = time.monotonic() - _BORN_S
    endpoint = Endpoint(args.socket, info_of(booted, args.name, started_s))
    loop = EngineLoop(scheduler, booted.runner, endpoint.send, plan.lag, _reserved_bytes(plan.device))
    signal.signal(signal.SIGTERM, lambda *_: loop.ask_to_end(args.drain_s))
    serving.append(loop)
    endpoint.start(loop)
    _say(Ready(started_s))
    log.info("ready after %.2f s", started_s)
    try:
        loop.run()
    finally:
        endpoint.stop()


def _end_with_parent(serving: list[EngineLoop], socket_path: Path) -> None:
    """Stop at once when the process that started this one closes our standard input, or is gone.

    Nobody else may be left to remove the socket and its directory.
    """
    os.read(sys.stdin.fileno(), 1)
    with contextlib.suppress(OSError):
        socket_path.unlink(missing_ok=True)
        socket_path.parent.rmdir()
    for loop in serving:
        loop.ask_to_end(0.0)
        time.sleep(_EXIT_GRACE_S)
    os._exit(1)  # it still loads, or is stuck in a step; nobody is left to wait for it


def info_of(booted: Booted, name: str | None, started_s: float) -> EngineInfo:
    """Return what clients are told of this process's engine; `name`: instead of its own."""
    plan, manifest = booted.plan, booted.artifact.manifest
    defaults = {
        field: float(value)
        for field in manifest.generation.__slots__
        if (value := getattr(manifest.generation, field)) is not None
    }
    return EngineInfo(
        name=name or manifest.name,
        digest=booted.artifact.digest,
        engine_dir=str(booted.artifact.directory.resolve()),
        family=manifest.model.family,
        device=plan.device,
        dtype=plan.dtype,
        weights=words(plan.formats),
        vocab_size=manifest.model.vocab_size,
        context_tokens=plan.context_tokens,
        page_tokens=plan.page_tokens,
        n_blocks=plan.n_blocks,
        max_sequences=plan.max_sequences,
        max_queue=plan.max_queue,
        step_tokens=plan.step_tokens,
        prefix_cache=plan.prefix_cache,
        eos_token_ids=list(manifest.model.eos_token_ids),
        bos_token_id=manifest.model.bos_token_id,
        defaults=defaults,
        memory=booted.memory,
        downgrades=booted.downgrades,
        launches=booted.launches,
        started_s=started_s,
        pid=os.getpid(),
    )


def _reserved_bytes(device: str) -> Callable[[], int]:
    return resident_bytes if device == "cpu" else lambda: cuda_memory().reserved_bytes


def _report(stage: str, detail: str) -> None:
    _say(Progress(stage, detail, time.monotonic() - _BORN_S))


def _say(message: Progress | Ready | Failed) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
