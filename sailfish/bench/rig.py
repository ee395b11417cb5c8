"""API processes in front of an engine's socket, as `sailfish serve` has them, for an engine started apart."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from sailfish.base import log
from sailfish.base.config import ServeConfig
from sailfish.engine.client import AsyncEngine
from sailfish.serve import server
from sailfish.serve.processes import ApiProcesses


async def _serve(socket_path: Path, n_processes: int) -> None:
    config = ServeConfig(port=0, api_processes=n_processes, drain_s=1.0)
    with server.bind(config) as listener:
        others = ApiProcesses(config, listener, socket_path)
        async with await AsyncEngine.attach(socket_path) as engine, others:

            def say_ready() -> None:
                port = listener.getsockname()[1]
                words = [server.READY, f"http://127.0.0.1:{port}", *map(str, [os.getpid(), *others.pids])]
                sys.stdout.write(" ".join(words) + "\n")
                sys.stdout.flush()

            await server.run(engine, config, [listener], on_ready=say_ready, on_drain=others.drain)


def main() -> None:
    """Serve the engine at the socket of the first argument with as many processes as the second says."""
    log.configure(level="warning")
    asyncio.run(_serve(Path(sys.argv[1]), int(sys.argv[2])))


if __name__ == "__main__":
    main()
