"""Faults of a live server: a dead or stopped engine, full queues and pools, clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from live import (
    SMALL,
    WAIT_S,
    Running,
    ask,
    descendants,
    engine_of,
    is_alive,
    is_idle,
    metrics,
    ready_reason,
    streams,
    until,
)

from sailfish.base.errors import WorkerDied
from sailfish.bench.server import ServerProcess

pytestmark = pytest.mark.slow
HURRIED, HURRIED_AT_ONCE = 500, 50


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """A server whose faults do not outlive a test."""
    with ServerProcess("books-4m", *SMALL) as running:
        yield running


def text_of(server: ServerProcess) -> str:
    """Return the greedy answer that tells whether a server is well."""
    reply = ask(server.url)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def test_an_engine_killed_in_mid_stream_costs_its_requests_one_error_each(server: ServerProcess) -> None:
    before = text_of(server)
    engine = engine_of(server.pid)
    running = streams(server.url, 4)
    engine.send_signal(signal.SIGKILL)
    for stream in running:
        stream.result().check(1)
        assert [error["code"] for error in stream.streamed.errors] == ["engine_unavailable"]
    until(lambda: ready_reason(server.url), "not ready without an engine")
    refused = ask(server.url)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
    assert float(refused.headers["retry-after"]) >= 1
    blind = httpx.get(f"{server.url}/metrics", timeout=4.0)
    assert blind.status_code == 503, "metrics do not wait for an engine that is gone"
    until(lambda: not ready_reason(server.url), "ready again by itself")
    assert engine_of(server.pid).pid != engine.pid
    assert text_of(server) == before


def test_a_stopped_engine_is_not_ready_and_goes_on_where_it_was(server: ServerProcess) -> None:
    engine = engine_of(server.pid)
    running = streams(server.url, 2)
    engine.suspend()
    try:
        reason = until(lambda: ready_reason(server.url), "not ready while the engine stands still")
        assert "heartbeat" in reason
        assert httpx.get(f"{server.url}/livez", timeout=WAIT_S).status_code == 200
    finally:
        engine.resume()
    for stream in running:
        stream.result().check(1)
        assert not stream.streamed.errors
    until(lambda: not ready_reason(server.url), "ready once the engine goes on")


def test_500_clients_in_a_hurry_leave_nothing_behind(server: ServerProcess) -> None:
    before = text_of(server)
    body = {"model": "books-4m", "prompt": "It was", "max_tokens": 400, "ignore_eos": True, "stream": True}

    async def hurry() -> int:
        limits = httpx.Limits(max_connections=HURRIED_AT_ONCE)
        timeout = httpx.Timeout(WAIT_S, read=0.1)
        async with httpx.AsyncClient(base_url=server.url, timeout=timeout, limits=limits) as client:

            async def one(i: int) -> bool:
                try:
                    reply = await client.post("/v1/completions", json=body | {"stream": i % 2 == 0})
                except httpx.ReadTimeout:
                    return True
                assert reply.status_code in (200, 503), reply.text
                return False

            return sum(await asyncio.gather(*(one(i) for i in range(HURRIED))))

    assert asyncio.run(hurry()) > 0
    until(lambda: is_idle(server.url), "nothing of them is left")
    assert text_of(server) == before


def test_a_client_that_never_reads_delays_nobody(server: ServerProcess) -> None:
    before = text_of(server)
    body = json.dumps(
        {
            "model": "books-4m", "prompt": "It was", "max_tokens": 450, "n": 6, "logprobs": 5,
            "ignore_eos": True, "stream": True,
        }
    ).encode()  # fmt: skip
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", urlsplit(server.url).port))
        deaf.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        until(lambda: metrics(server.url)["sailfish_running_sequences"], "its request runs")
        assert text_of(server) == before
        until(lambda: is_idle(server.url), "its sequences end though nobody reads them")
    assert text_of(server) == before


def test_more_sequences_than_blocks_all_end_with_the_text_they_have_alone() -> None:
    prompts = [f"Chapter {i}. It was a dark and" for i in range(6)]
    fields = {"max_tokens": 300, "ignore_eos": True}
    flags = ("--ctx", "512", "--concurrency", "6", "--step-tokens", "64", "--kv-memory", "1MiB")
    with ServerProcess("books-4m", *flags) as server:
        alone = ask(server.url, prompts[0], **fields).json()["choices"][0]["text"]
        running = [Running(server.url, {"prompt": prompt, **fields}) for prompt in prompts]
        for stream in running:
            stream.result().check(1)
            assert stream.streamed.finishes[0] == ["length"]
        assert running[0].streamed.texts[0] == alone
        assert metrics(server.url)["sailfish_preemptions_total"] > 0, "the pool was never too small"
        until(lambda: is_idle(server.url), "every block is free")


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    flags = ("--ctx", "512", "--concurrency", "1", "--step-tokens", "64", "--max-queue", "1")
    with ServerProcess("books-4m", *flags) as server:
        at_work = streams(server.url, 1)
        waiting = Running(server.url, {"max_tokens": 5})
        until(lambda: metrics(server.url)["sailfish_waiting_sequences"], "one waits")
        refused = ask(server.url)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert refused.headers["x-should-retry"] == "true"
        assert int(refused.headers["retry-after"]) >= 1
        for stream in (*at_work, waiting):
            stream.result().check(1)
            assert not stream.streamed.errors
        assert text_of(server)


def test_sigterm_lets_streams_end_and_takes_no_new_ones() -> None:
    with ServerProcess("books-4m", *SMALL) as server:
        engine = engine_of(server.pid)
        running = streams(server.url, 3)
        os.kill(server.pid, signal.SIGTERM)
        assert "draining" in until(lambda: ready_reason(server.url), "not ready once it drains")
        refused = ask(server.url)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) >= 1
        for stream in running:
            stream.result().check(1)
            assert stream.streamed.finishes[0] == ["length"]
        assert server.stop() == 0
        assert not is_alive(engine)


def test_streams_that_outlast_the_drain_are_told_so() -> None:
    with ServerProcess("books-4m", *SMALL, "--drain", "0s") as server:
        running = streams(server.url, 2)
        engine = engine_of(server.pid)
        engine.suspend()  # so that the streams cannot end in time
        try:
            os.kill(server.pid, signal.SIGTERM)
            for stream in running:
                stream.result().check(1)
                assert [error["code"] for error in stream.streamed.errors] == ["request_aborted"]
        finally:
            engine.resume()
        assert server.stop() == 0


def test_a_server_told_to_end_while_its_engine_starts_again_ends() -> None:
    with ServerProcess("books-4m", *SMALL) as server:
        first = engine_of(server.pid)
        first.send_signal(signal.SIGKILL)
        until(lambda: not is_alive(first), "the engine is dead")
        until(lambda: descendants(server.pid, "sailfish.engine.worker"), "another one starts")
        second = engine_of(server.pid)
        assert server.stop() == 0
        assert not is_alive(second)


def test_a_server_whose_engine_dies_again_and_again_ends_and_says_so() -> None:
    with ServerProcess("books-4m", *SMALL) as server:
        whole = psutil.Process(server.pid)
        killed: set[int] = set()

        def ends() -> bool:
            for engine in descendants(server.pid, "sailfish.engine.worker") if is_alive(whole) else []:
                if engine.pid not in killed:
                    killed.add(engine.pid)
                    engine.kill()
            return not is_alive(whole)

        until(ends, "the server ends by itself")
        assert 1 <= len(killed) <= 4, "it gives up after the fourth death in a minute, or a start that failed"
        assert "died again and again" in server.log()
        assert server.stop() == WorkerDied.exit_code
