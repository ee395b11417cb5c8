"""The door of the application: request ids, hosts, keys, quotas, and every error in OpenAI's shape."""

from __future__ import annotations

import ipaddress
import re
import uuid
from collections import Counter
from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sailfish.base.errors import SailfishError
from sailfish.serve.errors import ClientGone, Refusal, error_body, error_headers, status_of, unexpected
from sailfish.serve.site import Door

PUBLIC_PATHS = frozenset({"/livez", "/readyz"})
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
_HOST = re.compile(r"(?:\[(?P<ip6>[0-9A-Fa-f:.]+)\]|(?P<name>[0-9A-Za-z.-]+))(?::[0-9]{1,5})?")
_CORS_METHODS = b"GET, POST"
_CORS_HEADERS = b"authorization, content-type, x-request-id"


class Gate:
    """ASGI application around the routes; nothing gets past it unauthenticated, uncounted or unnamed."""

    def __init__(self, routes: ASGIApp, door: Door) -> None:
        self._routes = routes
        self._door = door
        self._at_work: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"only HTTP is served, not {scope['type']}")
        scope["app"] = self
        reply = _Reply(scope, send, self._door)
        try:
            await self._serve(scope, receive, reply)
        except ClientGone:
            if scope["state"].get("is_refused"):  # by the protocol, which has counted it
                return
            self._door.counters.gone()
        except HTTPException as error:
            await reply.refuse(_routing_refusal(error))
        except SailfishError as error:
            await reply.refuse(error)
        except Exception as error:  # noqa: BLE001 - the process edge: a bug must cost one request only
            await reply.refuse(unexpected(error))
        self._door.counters.reply(_route_name(scope), reply.status)

    async def _serve(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        door = self._door
        path = scope["path"]
        if not len(door.keys):
            _check_host(scope["headers"])
        if scope["method"] == "OPTIONS" and reply.is_cross_origin:
            await reply.preflight()
            return
        if path in PUBLIC_PATHS:
            await self._routes(scope, receive, reply)
            return
        tenant = door.keys.tenant(scope["headers"])
        scope["state"].update(tenant=tenant, request_id=reply.request_id)
        if scope["method"] == "POST" and door.closed is not None:
            raise Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                door.closed_code,
                door.closed,
                retry_after_s=1.0,
                headers={"connection": "close"},
            )
        if self._at_work[tenant] >= door.limits.requests_per_key:
            raise Refusal(
                HTTPStatus.TOO_MANY_REQUESTS,
                "rate_limit_exceeded",
                f"this key has {door.limits.requests_per_key} requests at work, the most it may have",
                retry_after_s=1.0,
            )
        self._at_work[tenant] += 1
        try:
            await self._routes(scope, receive, reply)
        finally:
            self._at_work[tenant] -= 1


class _Reply:
    """The reply's `send`, adding what every reply carries and remembering whether it began."""

    def __init__(self, scope: Scope, send: Send, door: Door) -> None:
        headers = dict(scope["headers"])
        sent_id = headers.get(b"x-request-id", b"")
        self.request_id = sent_id.decode() if _REQUEST_ID.fullmatch(sent_id) else f"req-{uuid.uuid4().hex}"
        self.status = 499
        """What is counted when no reply began: the client left."""
        self._send = send
        self._extra = [(b"x-request-id", self.request_id.encode()), (b"x-content-type-options", b"nosniff")]
        origin = headers.get(b"origin", b"").decode("latin-1")
        self.is_cross_origin = origin in door.origins
        if door.origins:
            self._extra.append((b"vary", b"origin"))
        if self.is_cross_origin:
            self._extra.append((b"access-control-allow-origin", origin.encode("latin-1")))
            self._extra.append((b"access-control-expose-headers", b"x-request-id, retry-after"))

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", []), *self._extra]}
        await self._send(message)

    async def refuse(self, error: SailfishError) -> None:
        """Reply with an error, if no other reply has begun."""
        if self.status != 499:
            return
        body = error_body(error)
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        await self._whole(status_of(error), headers | error_headers(error), body)

    async def preflight(self) -> None:
        """Answer the question a browser asks before a cross-origin request."""
        headers = {
            "access-control-allow-methods": _CORS_METHODS.decode(),
            "access-control-allow-headers": _CORS_HEADERS.decode(),
            "access-control-max-age": "600",
        }
        await self._whole(204, headers, b"")

    async def _whole(self, status: int, headers: dict[str, str], body: bytes) -> None:
        encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self({"type": "http.response.start", "status": status, "headers": encoded})
        await self({"type": "http.response.body", "body": body})


def _check_host(headers: list[tuple[bytes, bytes]]) -> None:
    """Refuse other names than this machine's own: without keys, a rebound name would open the server."""
    host = next((value.decode("latin-1") for name, value in headers if name == b"host"), "")
    found = _HOST.fullmatch(host)
    if found is not None:
        name = found["ip6"] or found["name"]
        if name.lower() == "localhost" or is_loopback(name):
            return
    raise Refusal(
        HTTPStatus.FORBIDDEN,
        "host_not_allowed",
        "a server without API keys answers to the names localhost, 127.0.0.1 and [::1] only",
    )


def is_loopback(address: str) -> bool:
    """Tell whether an IP address means this machine only."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _routing_refusal(error: HTTPException) -> Refusal:
    codes = {404: "not_found", 405: "method_not_allowed"}
    texts = {404: "there is no such route", 405: "this route does not take that method"}
    return Refusal(
        HTTPStatus(error.status_code),
        codes.get(error.status_code, "invalid_request"),
        texts.get(error.status_code, "the request is malformed"),
        headers={name.lower(): value for name, value in (error.headers or {}).items()},
    )


def _route_name(scope: MutableMapping[str, Any]) -> str:
    """Return a route's template, never a path a client made up: labels stay few."""
    route = scope.get("route")
    return str(getattr(route, "path", "other")).replace(":path}", "}")
