"""While the engine loads the server says so, and hands its socket on without a gap."""

from __future__ import annotations

import asyncio

import httpx
from serving import WAIT_S

from sailfish.base.config import ServeConfig
from sailfish.serve.server import bind
from sailfish.serve.waiting import WaitingRoom


def test_it_is_alive_not_ready_and_asks_everybody_to_come_again() -> None:
    async def scenario() -> None:
        config = ServeConfig(port=0, api_keys="secret-key")
        with bind(config) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            async with httpx.AsyncClient(base_url=url, timeout=WAIT_S) as client:
                async with WaitingRoom(config, listener) as room:
                    assert (await client.get("/livez")).status_code == 200
                    room.tell("weights")
                    ready = await client.get("/readyz")
                    assert ready.status_code == 503
                    assert ready.json()["error"]["message"] == "the engine is loading: weights"
                    assert (await client.get("/v1/models")).status_code == 401
                    key = {"authorization": "Bearer secret-key"}
                    for reply in (
                        await client.post("/v1/completions", headers=key, json={"prompt": "a"}),
                        await client.get("/v1/models", headers=key),
                    ):
                        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "loading")
                        assert int(reply.headers["retry-after"]) >= 1
                        assert reply.headers["x-request-id"]
                async with WaitingRoom(config, listener):  # the socket is as good as before
                    assert (await client.get("/livez")).status_code == 200

    asyncio.run(scenario())
