"""The one mapping from the error tree to HTTP: status, OpenAI's error object, retry headers."""

from __future__ import annotations

import logging
import math
from http import HTTPStatus

import msgspec

from sailfish.base.errors import (
    DeadlineExceeded,
    EngineError,
    Overloaded,
    RequestAborted,
    RequestError,
    SailfishError,
    WorkerDied,
)

log = logging.getLogger(__name__)

MAX_MESSAGE_CHARS = 500


class Refusal(RequestError):
    """A request that the server turns away with a status of its own choosing."""

    def __init__(
        self,
        status: HTTPStatus,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code, retry_after_s=retry_after_s)
        self.http_status = int(status)
        self.headers = headers or {}


def unexpected(error: Exception) -> EngineError:
    """Log a bug's traceback and return what its client is told."""
    log.error("a request failed unexpectedly", exc_info=error)
    return EngineError("unexpected failure", code="internal_error")


class ClientGone(Exception):
    """The client left: nobody is there to answer."""


class ErrorObject(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every reply that is not a success."""

    error: ErrorObject


def status_of(error: SailfishError) -> int:
    """Return the HTTP status of an error; a model's or engine's own fault is never the client's."""
    if isinstance(error, RequestError) or error.http_status >= 500:
        return error.http_status
    return error.http_status if isinstance(error, DeadlineExceeded) else 500


def error_object(error: SailfishError) -> ErrorObject:
    """Describe an error without what only the operator may see."""
    status = status_of(error)
    message = " ".join(str(error).split())
    if not isinstance(error, RequestError | Overloaded | DeadlineExceeded | RequestAborted | WorkerDied):
        log.error("%s, which its client is not told: %s", error.code, error)
        message = "the engine could not do this request; the server's log says why"
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[: MAX_MESSAGE_CHARS - 3] + "..."
    return ErrorObject(message=message, type=_type(status), param=error.param, code=error.code)


def error_body(error: SailfishError) -> bytes:
    """Return the JSON body {"error": {...}}."""
    return msgspec.json.encode(ErrorReply(error=error_object(error)))


def error_headers(error: SailfishError) -> dict[str, str]:
    """Return the headers that tell a client whether and when to try again."""
    headers = dict(error.headers) if isinstance(error, Refusal) else {}
    status = status_of(error)
    if status in (429, 503):
        wait_s = 1.0 if error.retry_after_s is None else max(error.retry_after_s, 0.001)
        headers["retry-after"] = str(math.ceil(wait_s))
        headers["retry-after-ms"] = str(math.ceil(wait_s * 1000))
        headers["x-should-retry"] = "true"
    elif status in (408, 500):
        headers["x-should-retry"] = "false"
    return headers


def _type(status: int) -> str:
    if status >= 500:
        return "server_error"
    return {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
