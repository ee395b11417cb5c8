"""Several API processes serve one engine on one port, and end together."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from serving import WAIT_S

from sailfish.base.config import EngineConfig, ServeConfig
from sailfish.build.cache import find_or_build
from sailfish.data import DEMO_MODEL_NAME
from sailfish.engine.client import AsyncEngine
from sailfish.engine.launch import EngineProcess
from sailfish.serve import server
from sailfish.serve.processes import ApiProcesses

KEY = {"authorization": "Bearer some-key-1"}
SMALL = EngineConfig(context_tokens=256, max_sequences=4, step_tokens=64)


async def eventually(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(WAIT_S):
        while not holds():
            await asyncio.sleep(0)


@pytest.mark.slow
def test_processes_share_the_port_and_a_dead_one_is_replaced(tmp_path: Path) -> None:
    engine_dir = find_or_build(DEMO_MODEL_NAME, SMALL, environ={"XDG_CACHE_HOME": str(tmp_path)})
    process = EngineProcess(engine_dir, SMALL)
    config = ServeConfig(port=0, api_processes=3, api_keys="me:some-key-1", drain_s=5.0)

    async def ask(url: str) -> set[str]:
        body = {"model": "books-4m", "prompt": "It was", "max_tokens": 4, "temperature": 0}
        texts = set()
        for _ in range(8):  # a fresh connection each, for whichever process takes it
            async with httpx.AsyncClient(base_url=url, headers=KEY, timeout=WAIT_S) as client:
                reply = await client.post("/v1/completions", json=body)
                assert reply.status_code == 200, reply.text
                texts.add(reply.json()["choices"][0]["text"])
        return texts

    async def main() -> None:
        listener = server.bind(config)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with (
            await AsyncEngine.attach(process.socket_path) as engine,
            ApiProcesses(config, listener, process.socket_path) as others,
        ):
            ready = asyncio.Event()
            serving = asyncio.create_task(
                server.run(engine, config, [listener], on_ready=ready.set, on_drain=others.drain)
            )
            await ready.wait()
            first = others.pids[0]
            assert len({os.getpid(), *others.pids}) == 3
            assert len(await ask(url)) == 1
            os.kill(first, signal.SIGKILL)
            await eventually(lambda: others.pids[0] != first)
            assert len(await ask(url)) == 1
            stats = await engine.stats()
            assert len(stats.clients) >= 3
            os.kill(os.getpid(), signal.SIGTERM)
            await serving

    process.start()
    try:
        asyncio.run(main())
    finally:
        process.stop()
