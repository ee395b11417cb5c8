"""JSON bodies read strictly: UTF-8, no duplicate keys, no infinities, bounded depth, an object on top."""

from __future__ import annotations

import json
import math
import re
from http import HTTPStatus
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from sailfish.serve.errors import ClientGone, Refusal
from sailfish.serve.gateway.limits import Limits

_NOT_MARKS = bytes(set(range(256)) - set(b'[]{},"'))
_PIECE_BYTES = 65_536
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_EXACT_BELOW = 2.0**53
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_object(request: Request, limits: Limits) -> dict[str, Any]:
    """Return the JSON object in a request's body; raise Refusal when there is none, or ClientGone."""
    media_type, _, parameters = request.headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower().replace('"', "")
    if media_type.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
        raise Refusal(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            "Content-Type must be application/json",
        )
    if "content-length" not in request.headers and "transfer-encoding" not in request.headers:
        raise Refusal(HTTPStatus.LENGTH_REQUIRED, "length_required", "the request has no body")
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
    except ClientDisconnect as error:
        raise ClientGone from error
    return parse_object(body, limits)


def parse_object(body: bytearray, limits: Limits) -> dict[str, Any]:
    """Parse bytes as one JSON object; raise a 400 otherwise."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        _refuse("the body is not valid UTF-8")
    _check_shape(body, limits)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_not_finite, parse_float=_number)
    except json.JSONDecodeError as error:
        _refuse(f"the body is not valid JSON: {error.msg} at character {error.pos}")
    except ValueError:  # an integer of more digits than Python converts
        _refuse("the body holds a number that is too large")
    if not isinstance(value, dict):
        _refuse("the body must be a JSON object")
    if _SURROGATE.search(body):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            _refuse("the body holds half a surrogate pair, which is no character")
    return value


def _check_shape(body: bytearray, limits: Limits) -> None:
    """Refuse what would cost a parser too much stack or memory; linear, and before any parser runs."""
    n_open = body.count(b"[") + body.count(b"{")
    if n_open <= limits.json_depth and body.count(b",") <= limits.json_commas:
        return
    marks = _marks_outside_strings(body)
    brackets = marks.translate(_ONE_KIND, b",")
    if len(brackets) > 2 * limits.json_containers or len(marks) - len(brackets) > limits.json_commas:
        most = f"{limits.json_containers} arrays and objects or {limits.json_commas} values"
        _refuse(f"the body holds more than {most}")
    for _ in range(limits.json_depth):
        brackets = brackets.replace(b"[]", b"")  # takes the innermost level away
    if brackets:
        _refuse(f"the body nests deeper than {limits.json_depth} levels, or its brackets do not match")


def _marks_outside_strings(body: bytearray) -> bytearray:
    """Return the brackets and commas that structure the body, in pieces: a split makes an object a string."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_MARKS)
    marks = bytearray()
    n_quotes = 0
    for start in range(0, len(plain), _PIECE_BYTES):
        parts = plain[start : start + _PIECE_BYTES].split(b'"')
        marks += b"".join(parts[n_quotes % 2 :: 2])
        n_quotes += len(parts) - 1
    return marks


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        _refuse("the body holds an object that names a key twice")
    return value


def _not_finite(_: str) -> NoReturn:
    _refuse("NaN and Infinity are not JSON")


def _number(text: str) -> float | int:
    """Read a number with a point or an exponent; JSON makes no difference between 2.0 and 2."""
    value = float(text)
    if math.isinf(value):
        _refuse("the body holds a number that is too large")
    return int(value) if value.is_integer() and abs(value) < _EXACT_BELOW else value


def _refuse(message: str) -> NoReturn:
    raise Refusal(HTTPStatus.BAD_REQUEST, "invalid_json", message)
