"""Streams: their format, and what happens when a client leaves, stops reading, or the server must stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from serving import WAIT_S, Running, read_all
from test_bad_input import CHAT, TEXT, check_error

from sailfish.base.config import ServeConfig
from sailfish.base.errors import DeadlineExceeded, Overloaded

Start = Callable[..., Running]


def request_bytes(path: str, body: dict[str, Any]) -> bytes:
    """Return a whole HTTP request."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def events_of(text: str) -> list[str]:
    """Return the data of every event, and that there is nothing else in the text."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    """Read until a mark came."""
    data = b""
    while mark not in data:
        part = connection.recv(65_536)
        assert part, data
        data += part
    return data


def test_a_chat_stream_is_laid_out_as_openai_does(shared: Running) -> None:
    with shared.client() as client:
        options = {"stream": True, "stream_options": {"include_usage": True}, "n": 2, "max_tokens": 2}
        reply = client.post("/v1/chat/completions", json=CHAT | options)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache" and reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["x-request-id"]
    *events, done = events_of(reply.text)
    assert done == "[DONE]"
    *pieces, usage = [json.loads(event) for event in events]
    for piece in pieces:
        assert piece["usage"] is None and piece["object"] == "chat.completion.chunk"
        assert [piece[name] for name in ("id", "created", "model")] == [
            usage[name] for name in ("id", "created", "model")
        ]
    firsts = [piece["choices"][0] for piece in pieces[:2]]
    assert [(c["index"], c["delta"]) for c in firsts] == [
        (i, {"role": "assistant", "content": ""}) for i in range(2)
    ]
    assert [p["choices"][0]["finish_reason"] for p in pieces[-2:]] == ["length", "length"]
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_without_the_option_no_chunk_has_usage(shared: Running) -> None:
    with shared.client() as client:
        reply = client.post("/v1/completions", json=TEXT | {"stream": True})
    pieces = [json.loads(event) for event in events_of(reply.text)[:-1]]
    assert all("usage" not in piece and len(piece["choices"]) == 1 for piece in pieces)
    assert len(pieces) == 16, "as many tokens as OpenAI generates unasked"
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"


def test_echoed_offsets_go_on_from_chunk_to_chunk(shared: Running) -> None:
    fields = {"stream": True, "echo": True, "logprobs": 1, "max_tokens": 2, "prompt_logprobs": 1}
    with shared.client() as client:
        reply = client.post("/v1/completions", json=TEXT | fields)
    choices = [json.loads(event)["choices"][0] for event in events_of(reply.text)[:-1]]
    assert [choice["text"] for choice in choices] == ["aba", "b"]
    assert [choice["logprobs"]["text_offset"] for choice in choices] == [[0, 1, 2], [3]]
    assert choices[0]["prompt_logprobs"][0] is None
    assert choices[0]["prompt_logprobs"][1]["98"] == {"logprob": -0.5, "decoded_token": "b"}
    assert "prompt_logprobs" not in choices[1]


def test_padded_chunks_all_have_sizes_of_whole_blocks(shared: Running) -> None:
    options = {"stream": True, "stream_options": {"include_obfuscation": True}}
    with shared.client() as client:
        reply = client.post("/v1/completions", json=TEXT | options | {"prompt": "aé€😀b"})
    sizes = {len(event.encode()) % 64 for event in events_of(reply.text)[:-1]}
    assert len(sizes) == 1


def test_a_silent_stream_is_kept_alive_with_comments(start: Start) -> None:
    running = start(FakeEngine(hold_after=1), keep_alive_s=0.1)
    with running.connect() as connection:
        connection.sendall(request_bytes("/v1/completions", TEXT | {"stream": True}))
        read_until(connection, b": keep-alive\n\n")
        running.call(running.engine.go_on.set)
        read_until(connection, b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("hold_after", [0, 2])
def test_a_client_that_leaves_frees_its_request_at_once(start: Start, stream: bool, hold_after: int) -> None:
    running = start(FakeEngine(hold_after=hold_after))
    with running.connect() as connection:
        connection.sendall(request_bytes("/v1/chat/completions", CHAT | {"stream": stream}))
        running.wait(running.engine.held)
    running.wait(running.engine.aborted)
    assert running.engine.submissions[0].aborted
    running.call(running.engine.go_on.set)
    assert running.is_fine()


def test_a_client_that_closes_one_half_is_gone_too(start: Start) -> None:
    running = start(FakeEngine(hold_after=1))
    with running.connect() as connection:
        connection.sendall(request_bytes("/v1/completions", TEXT | {"stream": True}))
        running.wait(running.engine.held)
        connection.shutdown(socket.SHUT_WR)
        running.wait(running.engine.aborted)


def test_a_client_that_leaves_while_a_second_request_waits_frees_the_first(start: Start) -> None:
    running = start(FakeEngine(hold_after=1))
    request = request_bytes("/v1/completions", TEXT | {"stream": True})
    with running.connect() as connection:
        connection.sendall(request + request)
        running.wait(running.engine.held)
    running.wait(running.engine.aborted)
    assert len(running.engine.submissions) == 1


def test_a_client_that_never_reads_is_held_back_then_dropped(start: Start) -> None:
    engine = FakeEngine(text_repeat=4000)
    running = start(engine, write_stall_s=0.3, write_buffer_bytes=65_536)
    with running.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(request_bytes("/v1/completions", TEXT | {"stream": True, "max_tokens": 4000}))
        running.wait(engine.aborted)
        assert not engine.submissions[0].ended
    engine.text_repeat = 1
    assert running.is_fine()
    running.wait_until_idle()


def test_every_prompts_stream_is_aborted_when_one_fails(start: Start) -> None:
    running = start(FakeEngine(fail_after=1, failure=DeadlineExceeded("too late")))
    with running.client() as client:
        reply = client.post("/v1/completions", json=TEXT | {"prompt": ["a", "b", "c"]})
        check_error(reply, 408, "deadline_exceeded")
        assert reply.headers["x-should-retry"] == "false"
    assert all(each.aborted for each in running.engine.submissions)


def test_a_full_queue_says_when_to_come_back(start: Start) -> None:
    running = start(FakeEngine(refuse=Overloaded("512 requests are waiting", retry_after_s=2.2)))
    with running.client() as client:
        reply = client.post("/v1/completions", json=TEXT | {"stream": True})
        check_error(reply, 503, "overloaded")
        assert reply.headers["retry-after"] == "3" and reply.headers["x-should-retry"] == "true"
        running.engine.refuse = None
    assert running.is_fine()


@pytest.mark.slow
def test_500_clients_that_give_up_leave_nothing_behind(start: Start) -> None:
    engine = FakeEngine(hold_after=1)
    running = start(engine)

    async def give_up() -> None:
        limits = httpx.Limits(max_connections=250)
        async with httpx.AsyncClient(base_url=running.url, limits=limits, timeout=WAIT_S) as client:

            async def one() -> None:
                with pytest.raises((TimeoutError, httpx.HTTPError)):
                    await asyncio.wait_for(client.post("/v1/completions", json=TEXT), 0.5)

            await asyncio.gather(*(one() for _ in range(500)))

    asyncio.run(give_up())
    running.call(engine.go_on.set)
    assert running.is_fine()
    running.wait_until_idle()
    assert all(each.aborted or each.ended for each in engine.submissions)


def reset(connection: socket.socket) -> None:
    """Close with a reset, as a killed client does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_a_reset_connection_is_a_client_that_left(start: Start) -> None:
    running = start(FakeEngine(hold_after=1))
    connection = running.connect()
    connection.sendall(request_bytes("/v1/completions", TEXT | {"stream": True}))
    running.wait(running.engine.held)
    reset(connection)
    running.wait(running.engine.aborted)


def test_a_drain_ends_running_streams_whole_and_refuses_new_requests(start: Start) -> None:
    running = start(FakeEngine(hold_after=1))
    with running.connect() as connection, running.client() as client:
        connection.sendall(request_bytes("/v1/completions", TEXT | {"stream": True}))
        running.wait(running.engine.held)
        running.call(running.server.drain)
        reply = client.get("/readyz")
        check_error(reply, 503, "not_ready")
        assert client.get("/livez").status_code == 200
        refused = client.post("/v1/completions", json=TEXT)
        check_error(refused, 503, "draining")
        assert refused.headers["retry-after"] == "1" and refused.headers["connection"] == "close"
        running.call(running.engine.go_on.set)
        assert b"data: [DONE]" in read_all(connection)
    running.thread.join(WAIT_S)
    assert not running.thread.is_alive()


def test_a_drain_that_takes_too_long_ends_streams_with_an_error(start: Start) -> None:
    running = start(FakeEngine(hold_after=1), config=ServeConfig(drain_s=0.1))
    with running.connect() as connection:
        connection.sendall(request_bytes("/v1/completions", TEXT | {"stream": True}))
        running.wait(running.engine.held)
        running.call(running.server.drain)
        text = read_all(connection).decode()
    assert '"code":"request_aborted"' in text and "[DONE]" not in text
    assert text.endswith("0\r\n\r\n"), "the chunked body must end properly"
    assert running.engine.submissions[0].aborted


SCRIPT = """
import asyncio, sys
from fake_engine import FakeEngine
from sailfish.base.config import ServeConfig
from sailfish.serve.server import bind, run

config = ServeConfig(port=0, drain_s=60.0)
listener = bind(config)
engine = FakeEngine(hold_after=1)

async def main():
    ready = lambda: print(listener.getsockname()[1], flush=True)
    await run(engine, config, [listener], on_ready=ready)

asyncio.run(main())
assert "torch" not in sys.modules
print("clean", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_first_signal_drains_and_a_second_stops_with_a_clean_exit(number: signal.Signals) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as connection:
            connection.sendall(request_bytes("/v1/completions", TEXT | {"stream": True}))
            read_until(connection, b'"text"')
            process.send_signal(number)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S) as client:
                while client.get("/readyz").status_code != 503:
                    pass
            assert process.poll() is None
            process.send_signal(number)
            assert b"request_aborted" in read_all(connection)
        assert process.stdout.read() == "clean\n"
        assert process.wait(WAIT_S) == 0
