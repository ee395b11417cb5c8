"""The frames between a client process and the engine process: length-prefixed, typed MessagePack.

A frame is a 4-byte little-endian length and one tagged message. The socket is a private AF_UNIX one;
nothing here can name code to run.
"""

from __future__ import annotations

import asyncio
import struct

import msgspec

from sailfish.base.errors import EngineError
from sailfish.engine.api import EngineInfo, EngineStats, TokenLogprob
from sailfish.engine.step import RowSampling

MAX_FRAME_BYTES = 64 * 2**20


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Client: accept one sequence, or refuse it."""

    key: int
    """The client's own number for the sequence, unique on its connection."""
    prompt_ids: list[int]
    sampling: RowSampling
    max_tokens: int | None
    priority: int
    deadline_s: float | None
    """Seconds from now within which it must end."""
    tenant: str
    """Salt of the prefix cache: tenants never see each other's blocks."""


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Client: end the sequence now."""

    key: int
    is_complete: bool = False
    """True: a stop string ended it, which only the client can see; False: nobody wants it any more."""


class StatsQuery(msgspec.Struct, frozen=True, tag="stats_query"):
    """Client: answer with a StatsReply of the same nonce."""

    nonce: int


class Report(msgspec.Struct, frozen=True, tag="report"):
    """Client: my own cumulative counters, for whoever asks for statistics."""

    name: str
    counters: dict[str, float]


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Client: refuse new work, end what runs within `deadline_s`, then exit."""

    deadline_s: float


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Engine: first frame on every connection."""

    info: EngineInfo


class Finish(msgspec.Struct, frozen=True):
    """How a sequence ended."""

    reason: str
    """stop, length, abort, deadline or error."""
    stop_token: int | None = None
    code: str = ""
    message: str = ""


class Event(msgspec.Struct, frozen=True, tag="event"):
    """Engine: news of one sequence. Exactly one event of an accepted sequence has `finish`."""

    key: int
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    n_cached: int = 0
    finish: Finish | None = None


def joined(events: list[Event]) -> Event:
    """Return consecutive news of one sequence as one event; only the last may have `finish`."""
    has_logprobs = any(event.logprobs is not None for event in events)
    return Event(
        key=events[0].key,
        token_ids=[token_id for event in events for token_id in event.token_ids],
        logprobs=[entry for event in events for entry in event.logprobs or []] if has_logprobs else None,
        prompt_logprobs=next((e.prompt_logprobs for e in events if e.prompt_logprobs is not None), None),
        n_cached=max(event.n_cached for event in events),
        finish=events[-1].finish,
    )


class Events(msgspec.Struct, frozen=True, tag="events"):
    """Engine: all news of one step for this client.

    Nearly all of it is one more token of a sequence that goes on; two arrays hold that, which costs neither
    side an object and a dozen field names each.
    """

    events: list[Event] = []
    keys: list[int] = []
    """Sequences of which there is one more token, and nothing else to tell."""
    token_ids: list[int] = []
    """Those tokens."""

    @property
    def items(self) -> list[Event]:
        """Everything as events."""
        plain = [Event(key, [token_id]) for key, token_id in zip(self.keys, self.token_ids, strict=True)]
        return plain + self.events


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    """Engine: the sequence will end in exactly one finish."""

    key: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Engine: the sequence was not accepted; nothing was done."""

    key: int
    code: str
    message: str
    param: str | None
    retry_after_s: float | None


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Engine: once a second. `stalled_s` is how long the current step has been running."""

    steps: int
    stalled_s: float
    draining: bool


class StatsReply(msgspec.Struct, frozen=True, tag="stats_reply"):
    """Engine: the answer to a StatsQuery."""

    nonce: int
    stats: EngineStats


ToEngine = Submit | Abort | StatsQuery | Report | Drain
ToClient = Hello | Events | Accepted | Refused | Beat | StatsReply

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_to_client = msgspec.msgpack.Decoder(ToClient)


def frame(message: ToEngine | ToClient) -> bytes:
    """Return the bytes of one message with its length in front."""
    body = _encoder.encode(message)
    return struct.pack("<I", len(body)) + body


async def read_to_engine(reader: asyncio.StreamReader) -> ToEngine | None:
    """Read one client message; None at the end of the stream."""
    body = await _read_body(reader)
    return None if body is None else _to_engine.decode(body)


async def read_to_client(reader: asyncio.StreamReader) -> ToClient | None:
    """Read one engine message; None at the end of the stream."""
    body = await _read_body(reader)
    return None if body is None else _to_client.decode(body)


async def _read_body(reader: asyncio.StreamReader) -> bytes | None:
    try:
        (length,) = struct.unpack("<I", await reader.readexactly(4))
        if length > MAX_FRAME_BYTES:
            raise EngineError(f"a frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
