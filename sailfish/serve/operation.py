"""What one route is: method, path, the function that answers, and the types that go in and come out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from sailfish.serve.site import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One route."""

    method: str
    path: str
    endpoint: Callable[[Site, Request], Awaitable[Response]]
    takes: tuple[type[Struct], ...] = ()
    """Forms of the request body."""
    gives: type[Struct] | None = None
    """The reply as JSON."""
    streams: type[Struct] | None = None
    """The events when the reply is streamed."""
