"""Every cap of the server, in one table."""

from __future__ import annotations

from dataclasses import dataclass, fields

from sailfish.engine.api import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)

_ENGINES_OWN = (
    ("n", MAX_N),
    ("stop_strings", MAX_STOP_STRINGS),
    ("stop_chars", MAX_STOP_CHARS),
    ("stop_token_ids", MAX_STOP_TOKEN_IDS),
    ("logit_bias", MAX_LOGIT_BIAS),
    ("logprobs", MAX_LOGPROBS),
)
"""What the engine takes, whoever asks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client may ask, and for how long it may take the server's time."""

    header_bytes: int = 65_536
    """Request line and headers together."""
    headers: int = 100
    """Header fields of one request."""
    body_bytes: int = 8 * 2**20
    """Request body, however it is framed."""
    body_chunks: int = 65_536
    """Frames of a chunked body."""
    json_depth: int = 32
    """Nesting of arrays and objects."""
    json_containers: int = 65_536
    """Arrays and objects of one body: each costs memory twenty times its two bytes."""
    json_commas: int = 2**19
    """Commas between the values of one body."""
    messages: int = 4096
    """Messages of one conversation."""
    prompts: int = 128
    """Prompts of one completion request."""
    sequences: int = 256
    """Prompts times n of one request."""
    tokenize_chars: int = 2**20
    """Characters of one text to tokenise, which need not fit the context."""
    connections: int = 1024
    """Open connections of one API process."""
    requests_per_key: int = 1024
    """Requests of one key that an API process works on at once; more get 429."""
    pipelined_requests: int = 16
    """Requests a connection may send ahead of their replies."""
    header_read_s: float = 10.0
    """From the first byte of a request, or a new connection, to the end of its headers."""
    body_read_s: float = 60.0
    """From the end of the headers to the end of the body."""
    idle_s: float = 75.0
    """A kept-alive connection without a request."""
    linger_s: float = 1.0
    """How long a refused client's remaining bytes are read and dropped before the connection closes."""
    linger_bytes: int = 16 * 2**20
    """How many of them are read at most."""
    write_buffer_bytes: int = 262_144
    """Unsent reply bytes of a connection before its stream is held back."""
    write_stall_s: float = 30.0
    """A connection held back for so long is dropped, and its request aborted."""
    keep_alive_s: float = 15.0
    """A comment is sent into a stream that was silent for so long."""

    def rows(self) -> list[tuple[str, float]]:
        """Return (name, value) of every cap."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)] + list(_ENGINES_OWN)


LIMITS = Limits()
