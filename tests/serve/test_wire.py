"""Bytes that no honest client sends: answered cleanly or cut off, and the next request works."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import WAIT_S, Running, read_all

Start = Callable[..., Running]
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"


def code_of(reply: bytes) -> tuple[int, str]:
    """Return the status and error code of the only reply in these bytes."""
    assert reply.count(b"HTTP/1.1 ") == 1, reply[:300]
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"x-request-id: " in head.lower()
    return int(head.split()[1]), str(json.loads(body)["error"]["code"])


def flood(running: Running, first: bytes, piece: bytes, times: int) -> tuple[int, bytes]:
    """Send `first` and then a piece again and again; return how much was sent, and the reply."""
    sent = 0
    with running.connect() as connection:
        connection.sendall(first)
        try:
            for _ in range(times):
                connection.sendall(piece)
                sent += len(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
        return sent, read_all(connection)


def test_a_header_without_end_is_431_long_before_its_end(shared: Running) -> None:
    sent, reply = flood(shared, GET + b"X-Long: ", b"a" * 65_536, 1024)
    assert sent < 32 * 2**20
    assert reply == b"" or code_of(reply) == (431, "headers_too_large")
    assert shared.is_fine()


def test_a_header_a_little_too_long_is_told_so(shared: Running) -> None:
    assert code_of(shared.raw(GET + b"X-Long: " + b"a" * 66_000 + b"\r\n\r\n")) == (431, "headers_too_large")
    assert shared.is_fine()


def test_ten_thousand_headers_are_431(shared: Running) -> None:
    assert code_of(shared.raw(GET + b"A: b\r\n" * 10_000 + b"\r\n")) == (431, "headers_too_large")
    assert shared.is_fine()


def test_headers_that_dribble_in_are_cut_off_in_time(start: Start) -> None:
    running = start(header_read_s=0.2)
    with running.connect() as slow:
        slow.sendall(b"GET /livez HTT")
        assert code_of(read_all(slow)) == (408, "request_timeout")
    with running.connect() as silent:
        assert code_of(read_all(silent)) == (408, "request_timeout")
    assert any(running.is_fine() for _ in range(5)), "a busy machine may be late with a whole request too"


def test_a_body_that_dribbles_in_is_cut_off_in_time(start: Start) -> None:
    running = start(body_read_s=0.2)
    with running.connect() as slow:
        slow.sendall(HEAD + b'Content-Length: 100\r\n\r\n{"mod')
        assert code_of(read_all(slow)) == (408, "request_timeout")
    assert any(running.is_fine() for _ in range(5)), "a busy machine may be late with a whole request too"
    running.wait_until_idle()


def test_an_idle_connection_is_closed(start: Start) -> None:
    with start(idle_s=1.0).connect() as idle:
        idle.sendall(GET + b"\r\n")
        assert read_all(idle).startswith(b"HTTP/1.1 200")


def test_a_gibibyte_is_refused_by_its_announcement(shared: Running) -> None:
    assert code_of(shared.raw(HEAD + b"Content-Length: 1073741824\r\n\r\n")) == (413, "request_too_large")
    assert code_of(shared.raw(HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n"))[0] == 400
    assert shared.is_fine()


def test_a_gibibyte_in_chunks_is_refused_at_the_cap(shared: Running) -> None:
    piece = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    sent, reply = flood(shared, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", piece, 16_384)
    assert sent < 64 * 2**20
    assert reply == b"" or code_of(reply) == (413, "request_too_large")
    assert shared.is_fine()


def test_half_a_million_tiny_chunks_are_refused(shared: Running) -> None:
    tiny = b"6\r\n      \r\n" * 5000
    sent, reply = flood(shared, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", tiny, 100)
    assert reply == b"" or code_of(reply) == (413, "request_too_large")
    assert shared.is_fine()


def test_a_body_shorter_than_announced_is_no_request(shared: Running) -> None:
    with shared.connect() as liar:
        liar.sendall(HEAD + b'Content-Length: 500\r\n\r\n{"model": "fake"}')
        liar.shutdown(socket.SHUT_WR)
        assert read_all(liar) == b""
    assert shared.is_fine()
    shared.wait_until_idle()


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: identity\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: 5, 5\r\n",
        b"X: a\r\n b\r\n",
    ],
)
def test_ambiguous_framing_is_refused_and_nothing_smuggled(shared: Running, framing: bytes) -> None:
    smuggled = b"0\r\n\r\n" + GET + b"\r\n"
    assert code_of(shared.raw(HEAD + framing + b"\r\n" + smuggled))[0] == 400
    assert shared.is_fine()


@pytest.mark.parametrize("hosts", [b"", b"Host: localhost\r\nHost: evil\r\n"])
def test_exactly_one_host_header_is_needed(shared: Running, hosts: bytes) -> None:
    assert code_of(shared.raw(b"GET /livez HTTP/1.1\r\n" + hosts + b"\r\n")) == (400, "invalid_http")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), id="TLS"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2 preface"),
        pytest.param(b"GET http://\xff/ HTTP/1.1\r\nHost: a\r\n\r\n", id="bad URL"),
        pytest.param(b"\x00" * 100, id="NULs"),
        pytest.param(b"GET /livez HTTP/9.9\r\nHost: localhost\r\n\r\n", id="HTTP/9.9"),
    ],
)
def test_what_is_no_http_1_gets_a_clean_400(shared: Running, data: bytes) -> None:
    assert code_of(shared.raw(data))[0] == 400
    assert shared.is_fine()


def test_pipelined_requests_are_answered_in_order_and_bounded(shared: Running) -> None:
    last = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert shared.raw((GET + b"\r\n") * 5 + last).count(b'{"status":"ok"}') == 6
    many = shared.raw((GET + b"\r\n") * 5000)
    assert many.count(b"HTTP/1.1 200") == shared.server.site.limits.pipelined_requests + 1
    assert many.count(b"HTTP/1.1 ") == many.count(b"HTTP/1.1 200") + 1
    assert many.endswith(b"}}") and b'"code":"too_many_pipelined_requests"' in many
    assert shared.is_fine()


BODY = b'{"model": "fake", "prompt": "ab", "max_tokens": 2}'
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"\x00" * 100, id="NULs"),
        pytest.param(GET + b"A: b\r\n" * 200 + b"\r\n", id="too many headers"),
        pytest.param(HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz", id="a body that is none"),
    ],
)
def test_whole_requests_are_answered_before_what_follows_is_refused(shared: Running, garbage: bytes) -> None:
    first, second, last = shared.raw(WHOLE + WHOLE + garbage).split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200") and second.startswith(b"200") and b'"text":"ab"' in second
    assert code_of(b"HTTP/1.1 " + last)[0] in (400, 431)
    assert shared.is_fine()


def test_an_unread_body_does_not_become_a_request(shared: Running) -> None:
    body = b'{"model": "fake", "prompt": "a"}' + b" " * 100_000
    reply = shared.raw(
        b"POST /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (len(body) * 2) + body
    )
    assert code_of(reply) == (405, "method_not_allowed")


def test_one_connection_too_many_is_told_to_come_back(start: Start) -> None:
    running = start(connections=2)
    with running.connect() as first, running.connect() as second:
        for held in (first, second):
            held.sendall(GET + b"\r\n")
            assert held.recv(1000).startswith(b"HTTP/1.1 200")
        reply = running.raw(b"")
        assert code_of(reply) == (503, "too_many_connections") and b"retry-after: 1" in reply
    assert running.is_fine()


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
def test_an_upgrade_is_answered_as_plain_http(shared: Running, protocol: bytes) -> None:
    wish = (
        b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\nUpgrade: " + protocol + b"\r\n"
    )
    framed = wish + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    chunked = wish + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    reply = shared.raw(
        HEAD + framed + HEAD + chunked + GET + wish + b"\r\n" + GET + b"Connection: close\r\n\r\n"
    )
    assert reply.count(b'"text":"ab"') == 2 and reply.count(b'{"status":"ok"}') == 2
    assert reply.count(b"HTTP/1.1 200") == 4
    last = b"Connection: close, Upgrade\r\nUpgrade: h2c\r\n"
    assert b'"text":"ab"' in shared.raw(HEAD + last + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
    assert b"HTTP/1.1 200" in shared.raw(GET + b"Connection: upgrade, close\r\nUpgrade: x\r\n\r\n")
    assert code_of(shared.raw(b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n"))[0] == 405


def test_trailers_and_chunk_extensions_are_dropped_and_bounded(shared: Running) -> None:
    head = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b"%x;name=value\r\n%s\r\n0\r\n" % (len(BODY), BODY)
    assert b'"text":"ab"' in shared.raw(head + body + b"Host: evil\r\nContent-Encoding: gzip\r\n\r\n")
    for endless in (body + b"X: ", b"5;", body + b"X: y\r\n" * 1000):
        sent, reply = flood(shared, head + endless, b"y" * 65_536, 1024)
        assert sent < 32 * 2**20
        assert reply == b"" or code_of(reply)[0] in (400, 413)
    assert shared.is_fine()


SCRIPT = """
import asyncio
from fake_engine import FakeEngine
from sailfish.base.config import ServeConfig
from sailfish.serve.server import bind, run

config = ServeConfig(port=0)
listener = bind(config)

async def main():
    await run(FakeEngine(), config, [listener], on_ready=lambda: print(listener.getsockname()[1], flush=True))

asyncio.run(main())
"""


def peak_bytes(pid: int) -> int:
    """Return the largest resident set of a process so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to read a process's memory")
def test_no_flood_makes_the_server_grow_by_64_mebibytes() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    small = b'"ab",' * 500_000 + b'"a"]}'
    worst = [
        b"[" * 8_000_000,
        b'{"a":[' + b"[]," * 2_600_000,
        b'{"a":[' + b'"ab",' * 1_000_000 + small,
        b'{"a":[' + small,
    ]
    worst += [b'{"a":[' + b"1.5," * 1_000_000 + b"1]}", b'{"prompt":"' + b"\\n" * 4_000_000 + b'"}']
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        running = Stranger(port=int(process.stdout.readline()))
        warm = HEAD + b'Content-Length: 17\r\nConnection: close\r\n\r\n{"model": "fake"}'
        assert running.raw(warm).startswith(b"HTTP/1.1 400")
        before = peak_bytes(process.pid)
        flood(running, GET + b"X-Long: ", b"a" * 65_536, 1024)
        piece = b"10000\r\n" + b" " * 65_536 + b"\r\n"
        flood(running, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", piece, 2000)
        flood(running, HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: ", b"y" * 65_536, 2000)
        for body in worst:
            reply = running.raw(HEAD + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
            assert reply.startswith(b"HTTP/1.1 400"), reply[:200]
        grown = peak_bytes(process.pid) - before
        process.terminate()
        assert process.wait(WAIT_S) == 0
    assert grown < 64 * 2**20, grown


class Stranger(Running):
    """A server in another process, of which only the port is known."""

    def __init__(self, *, port: int) -> None:
        self.port = port
