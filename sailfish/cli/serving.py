"""Brings up what `sailfish serve` is made of, says what it is, and takes it down again."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from pathlib import Path

import typer

from sailfish.base.config import ServeConfig
from sailfish.base.errors import EngineError, WorkerDied
from sailfish.base.units import format_bytes
from sailfish.checkpoint.template import ChatTemplate
from sailfish.cli.options import Settings
from sailfish.engine.api import EngineInfo
from sailfish.engine.client import AsyncEngine
from sailfish.engine.launch import EngineProcess, Progress
from sailfish.serve import server
from sailfish.serve.gateway.auth import load_keys
from sailfish.serve.gateway.gate import is_loopback
from sailfish.serve.gateway.limits import LIMITS
from sailfish.serve.processes import ApiProcesses
from sailfish.serve.waiting import WaitingRoom

log = logging.getLogger("sailfish.serve")


def serve_engine(
    engine_dir: Path,
    settings: Settings,
    listener: socket.socket,
    *,
    chat_template: Path | None = None,
    trace_to: Path | None = None,
    log_level: str = "info",
    log_json: bool = False,
) -> None:
    """Start the engine process, serve on the listening socket until a signal came, and end cleanly."""
    template = None
    if chat_template is not None:
        template = ChatTemplate.load(engine_dir, override=chat_template)
        assert template is not None
        template.check()
    room = WaitingRoom(settings.serve, listener)

    def tell(progress: Progress) -> None:
        log.info("%.2f s %s: %s", progress.elapsed_s, progress.stage, progress.detail)
        room.tell(progress.stage)

    gave_up = threading.Event()

    def give_up() -> None:
        gave_up.set()
        signal.raise_signal(signal.SIGTERM)  # drain: what is left to do is to say so

    process = EngineProcess(
        engine_dir,
        settings.engine,
        name=settings.serve.served_model_name,
        restart=True,
        trace_to=trace_to,
        drain_s=settings.serve.drain_s,
        log_level=log_level,
        log_json=log_json,
        on_progress=tell,
        on_give_up=give_up,
    )
    others = ApiProcesses(settings.serve, listener, process.socket_path, chat_template=chat_template)
    asyncio.run(_serve(process, room, settings.serve, listener, others, template))
    if gave_up.is_set():
        raise WorkerDied("the engine process died again and again", hint="its log says why")


async def _serve(
    process: EngineProcess,
    room: WaitingRoom,
    config: ServeConfig,
    listener: socket.socket,
    others: ApiProcesses,
    template: ChatTemplate | None,
) -> None:
    asked = _watch_signals(process)
    try:
        async with room:
            await asyncio.to_thread(process.start)
        async with await AsyncEngine.attach(process.socket_path, process=process) as engine, others:
            if template is not None:
                engine.template = template
            _log_memory(engine.info)
            _log_security(config, listener.getsockname()[0])
            await server.run(
                engine,
                config,
                [listener],
                on_ready=lambda: typer.echo(f"{server.READY} {_url(listener)}"),
                on_drain=others.drain,
            )
    except EngineError:
        if not asked:
            raise
    if asked:
        await asyncio.to_thread(process.stop)
        raise SystemExit(128 + asked[0])
    log.info("ended")


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _watch_signals(process: EngineProcess) -> list[int]:
    """End the engine process at a signal, until the server takes signals itself; return those that came."""
    loop = asyncio.get_running_loop()
    asked: list[int] = []

    def stop(number: int) -> None:
        asked.append(number)
        threading.Thread(target=process.stop, daemon=True).start()

    for number in server.draining_signals():
        loop.add_signal_handler(number, stop, number)
    return asked


def _log_memory(info: EngineInfo) -> None:
    log.info(
        "%s on %s in %s: %d tokens of context, %d sequences at once, %d blocks of %d tokens",
        *(info.name, info.device, info.dtype, info.context_tokens, info.max_sequences),
        *(info.n_blocks, info.page_tokens),
    )
    for downgrade in info.downgrades:
        log.warning("downgrade: %s", downgrade)
    for line in info.memory:
        measured = "not measured" if line.measured_bytes is None else format_bytes(line.measured_bytes)
        log.info(
            "memory %-11s planned %9s, measured %9s", line.name, format_bytes(line.planned_bytes), measured
        )


def _log_security(config: ServeConfig, host: str) -> None:
    n_keys = len(load_keys(config))
    reach = "this machine only" if is_loopback(host) else "whoever reaches this address"
    if n_keys:
        log.info("security: open to %s, with a key (%d known) but for /livez and /readyz", reach, n_keys)
    else:
        log.info("security: open to %s, without API keys", reach)
    log.info("security: browsers of other origins: %s", config.cors_origins or "none")
    log.info(
        "security: bodies to %s, headers to %s, %d connections; all caps are in serve/gateway/limits.py",
        *(format_bytes(LIMITS.body_bytes), format_bytes(LIMITS.header_bytes), LIMITS.connections),
    )
    log.info("security: cached prefixes are never shared between keys; prompts are never logged")
