"""HTTP/1.1 on a socket with every cap enforced before the application sees a byte."""

from __future__ import annotations

import asyncio
import uuid
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, NoReturn

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from sailfish.serve.errors import Refusal, error_body, error_headers
from sailfish.serve.gateway.limits import LIMITS, Limits
from sailfish.serve.metrics.counters import Counters

_FRAME_BYTES = 16
"""What a chunk of a body needs for its size and line ends; chunk extensions and trailers come on top."""


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounded headers, bodies, waits, buffers and connections."""

    limits: Limits = LIMITS
    counters: Counters

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_headers = True
        self._header_bytes = 0
        self._body_bytes = 0
        self._body_chunks = 0
        self._framing_bytes = 0
        """Of the request being read: what came after its headers and is not its body."""
        self._fault: Refusal | None = None
        self._last_word: Refusal | None = None
        """What is said once the whole requests that came before the fault are answered."""
        self._lingering = False
        self._dropped_bytes = 0
        self._active: RequestResponseCycle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first request, or refuse one connection too many."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self.limits.write_buffer_bytes)
        if len(self.connections) > self.limits.connections:
            message = f"{self.limits.connections} connections are open, which is the most this server takes"
            self._turn_away(
                Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "too_many_connections", message, retry_after_s=1.0)
            )
        else:
            self._allow_s(self.limits.header_read_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the running request, which need not be the one parsed last, that its client left."""
        self._stop_reading_clock()
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().connection_lost(exc)
        if self._active is not None:
            self._active.disconnected = True
            self._active.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Feed the parser, counting the bytes that have not become a request yet."""
        if self._lingering or self._last_word is not None:
            self._dropped_bytes += len(data)
            if self._dropped_bytes > self.limits.linger_bytes:
                self.transport.abort()
            return
        if self._in_headers:
            self._header_bytes += len(data)
            if self._read_timer is None and not self._is_working():
                self._allow_s(self.limits.header_read_s)
        self._unset_keepalive_if_required()
        cycle, n_body_bytes = self.cycle, self._body_bytes
        try:
            self._parse(data)
        except httptools.HttpParserError:
            what = "these bytes are no HTTP request"
            self._turn_away(self._fault or Refusal(HTTPStatus.BAD_REQUEST, "invalid_http", what))
            return
        if self._in_headers:
            if self._header_bytes > self.limits.header_bytes:
                self._turn_away(self._headers_too_large())
        elif self.cycle is cycle:
            self._framing_bytes += len(data) - (self._body_bytes - n_body_bytes)
            if self._framing_bytes > self.limits.header_bytes + _FRAME_BYTES * self._body_chunks:
                self._turn_away(self._body_too_large())

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header field; trailers, which look the same, are dropped."""
        if not self._in_headers:
            return
        super().on_header(name, value)
        if len(self.headers) > self.limits.headers:
            self._refuse(self._headers_too_large())

    def on_headers_complete(self) -> None:
        """Check what the headers announce, then start the application."""
        if self.parser.get_method() == b"CONNECT":
            self._refuse(Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "method_not_allowed", "this is no proxy"))
        if self.parser.should_upgrade():
            return
        self._stop_reading_clock()
        self._in_headers = False
        self._header_bytes = 0
        self._body_bytes = 0
        self._body_chunks = 0
        self._framing_bytes = 0
        if len(self.pipeline) >= self.limits.pipelined_requests:
            message = f"more than {self.limits.pipelined_requests} requests were sent ahead of their replies"
            self._refuse(Refusal(HTTPStatus.BAD_REQUEST, "too_many_pipelined_requests", message))
        self._check_headers()
        super().on_headers_complete()
        self._allow_s(self.limits.body_read_s)

    def on_chunk_header(self) -> None:
        """Count one frame of a chunked body."""
        self._body_chunks += 1
        if self._body_chunks > self.limits.body_chunks:
            self._refuse(self._body_too_large())

    def on_body(self, body: bytes) -> None:
        """Take body bytes up to the cap, which a chunked body reaches only by sending them."""
        self._body_bytes += len(body)
        if self._body_bytes > self.limits.body_bytes:
            self._refuse(self._body_too_large())
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Mark the request as wholly read."""
        if self.parser.should_upgrade():
            return
        self._stop_reading_clock()
        self._in_headers = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with the next request, unless the body of this one was never read."""
        if self.cycle.response_complete and self.cycle.more_body:
            self._linger()
        elif self._last_word is not None and not self.pipeline:
            self._turn_away(self._last_word)
        else:
            super().on_response_complete()

    def pause_writing(self) -> None:
        """Give a client that does not read its reply a last chance."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.write_stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Forget the stall: the client reads again."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._active = cycle
        super()._start_asgi_task(cycle, app)

    def _parse(self, data: bytes) -> None:
        """Feed the parser; a request that wishes for another protocol is read again without the wish."""
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                version = self.parser.get_http_version().encode()
                lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
                lines += [b"%s: %s" % field for field in self.headers if field[0] != b"upgrade"]
                data = b"\r\n".join(lines) + b"\r\n\r\n" + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)  # the old one may count itself closed

    def _check_headers(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.header_bytes:
            self._refuse(self._headers_too_large())
        names = [name for name, _ in self.headers]
        values = dict(self.headers)
        coding = values.get(b"transfer-encoding")
        if coding is not None and (b"content-length" in values or coding.strip().lower() != b"chunked"):
            self._refuse(
                Refusal(
                    HTTPStatus.BAD_REQUEST,
                    "invalid_http",
                    "a body is framed by Content-Length or by `Transfer-Encoding: chunked`, nothing else",
                )
            )
        if names.count(b"host") > 1 or (b"host" not in names and self.parser.get_http_version() == "1.1"):
            self._refuse(Refusal(HTTPStatus.BAD_REQUEST, "invalid_http", "exactly one Host header is needed"))
        if values.get(b"content-encoding", b"identity").strip().lower() != b"identity":
            self._refuse(
                Refusal(
                    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                    "unsupported_content_encoding",
                    "compressed bodies are not taken; send the JSON as it is",
                )
            )
        if int(values.get(b"content-length", b"0")) > self.limits.body_bytes:
            self._refuse(self._body_too_large())

    def _headers_too_large(self) -> Refusal:
        return Refusal(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            "headers_too_large",
            f"the headers exceed {self.limits.header_bytes} bytes or {self.limits.headers} fields",
        )

    def _body_too_large(self) -> Refusal:
        return Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            "request_too_large",
            f"the body exceeds {self.limits.body_bytes} bytes or {self.limits.body_chunks} chunks",
        )

    def _refuse(self, fault: Refusal) -> NoReturn:
        """Stop the parser from inside one of its callbacks; `data_received` then answers."""
        self._fault = fault
        raise httptools.HttpParserError(fault.code)

    def _turn_away(self, fault: Refusal) -> None:
        """Reply where that cannot be mistaken for another request's reply, then close."""
        if self._lingering or self.transport.is_closing():
            return
        active = self._active
        if active is not None and not active.response_complete:
            if not active.more_body:
                self._answer_first(fault)
                return
            active.scope["state"]["is_refused"] = True
            active.disconnected = True
            active.message_event.set()
        if active is None or active.response_complete or not active.response_started:
            self.transport.write(_whole_reply(fault))
            self.counters.reply("other", fault.http_status)
        self._linger()

    def _answer_first(self, fault: Refusal) -> None:
        """Keep the refusal until the whole requests before it are answered; drop the one it is about."""
        self._last_word = fault
        if self.pipeline and self.pipeline[0][0].more_body:
            self.pipeline.popleft()
        self._stop_reading_clock()

    def _is_working(self) -> bool:
        return self._active is not None and not self._active.response_complete

    def _linger(self) -> None:
        """Close, but read on for a moment: a reset would take the reply from a client still sending."""
        self._stop_reading_clock()
        self._lingering = True
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._read_timer = self.loop.call_later(self.limits.linger_s, self.transport.close)

    def _allow_s(self, seconds: float) -> None:
        self._stop_reading_clock()
        self._read_timer = self.loop.call_later(seconds, self._too_slow)

    def _too_slow(self) -> None:
        self._turn_away(
            Refusal(HTTPStatus.REQUEST_TIMEOUT, "request_timeout", "the request did not arrive in time")
        )

    def _stop_reading_clock(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None


def guarded(limits: Limits, counters: Counters) -> type[GuardedProtocol]:
    """Return the protocol class bound to these limits, counting what it refuses."""
    return type("BoundProtocol", (GuardedProtocol,), {"limits": limits, "counters": counters})


def _whole_reply(fault: Refusal) -> bytes:
    body = error_body(fault)
    headers = {
        "date": formatdate(usegmt=True),
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        "x-request-id": f"req-{uuid.uuid4().hex}",
        **error_headers(fault),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return STATUS_LINE[fault.http_status] + lines.encode("ascii") + b"\r\n" + body
