"""API keys: many, named, stored as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from http import HTTPStatus
from pathlib import Path

from sailfish.base.config import ServeConfig
from sailfish.base.errors import ConfigError
from sailfish.serve.errors import Refusal

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[!-~]{8,512}")


class KeyRing:
    """The keys that may use a server; an empty ring lets everyone in."""

    def __init__(self, keys: Iterable[tuple[str, str]] = ()) -> None:
        self._digests = [(name, hashlib.sha256(key.encode()).digest()) for name, key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def tenant(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Return the name of the key that a request carries, "" on an empty ring; raise a 401 otherwise."""
        if not self._digests:
            return ""
        sent = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = sent[0].partition(b" ") if len(sent) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(key.strip()).digest()
        found = ""
        for name, known in self._digests:  # never ends early: the time must not tell which key was near
            if hmac.compare_digest(digest, known):
                found = name
        if not found or scheme.lower() != b"bearer":
            raise Refusal(
                HTTPStatus.UNAUTHORIZED,
                "invalid_api_key",
                "no valid API key; send it as `Authorization: Bearer <key>`",
                headers={"www-authenticate": "Bearer"},
            )
        return found


def load_keys(config: ServeConfig) -> KeyRing:
    """Read the keys that the configuration names; raise ConfigError on a malformed, short or doubled one."""
    lines = (config.api_keys or "").split(",")
    if config.api_keys_file is not None:
        try:
            lines += Path(config.api_keys_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"the API key file {config.api_keys_file} cannot be read: {type(error).__name__}"
            ) from error
    keys: dict[str, str] = {}
    for line in lines:
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        name, colon, key = entry.partition(":")
        if not colon:
            name, key = f"key-{len(keys) + 1}", entry
        if not _NAME.fullmatch(name) or not _KEY.fullmatch(key):
            raise ConfigError(
                f"API key number {len(keys) + 1} is malformed",
                hint="one `name:key` or `key` each; keys have 8 to 512 printable ASCII characters, no spaces",
            )
        if name in keys:
            raise ConfigError(f"two API keys are named {name!r}", hint="give each key its own name")
        keys[name] = key
    if config.api_keys_file is not None and not keys:
        raise ConfigError(f"the API key file {config.api_keys_file} holds no key")
    return KeyRing(keys.items())
