"""Render chat templates in a killable subprocess, and tokenise the result so that content stays content."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sailfish.base.errors import CheckpointError, RequestError
from sailfish.checkpoint.files import read_bytes, read_json, shown
from sailfish.checkpoint.tokenizer import TOKENIZER_CONFIG_FILE, Tokenizer, special_token_texts

TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 1 << 20
MAX_MESSAGES_BYTES = 8 << 20
MAX_RENDERED_BYTES = 4 << 20
RENDER_S = 2.0
START_S = 30.0
WORKER_MEMORY_BYTES = 768 << 20
_MAX_REPLY_BYTES = 8 * MAX_RENDERED_BYTES
_MAX_REASON_CHARS = 300
_OWN = {"tools": None, "documents": None}
"""Variables that templates ask for and that are empty here."""

Message = Mapping[str, Any]


class ChatTemplate:
    """A model's chat template. Safe to share between threads; renders one conversation at a time."""

    def __init__(
        self,
        source: str,
        variables: Mapping[str, str],
        *,
        origin: str = "the chat template",
        render_s: float = RENDER_S,
    ) -> None:
        """Take the Jinja source, and bos_token, eos_token ... as the template sees them."""
        self.source = source
        self._origin = origin
        self._reads: frozenset[str] = frozenset()
        """Names that the template looks up; known once it is compiled."""
        self._variables = dict(variables)
        self._render_s = render_s
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    @classmethod
    def load(cls, directory: Path | str, override: Path | None = None) -> ChatTemplate | None:
        """Find a directory's template, or None when it has none; `override` names a file to use instead."""
        directory = Path(directory)
        path = override or directory / TEMPLATE_FILE
        if override is not None or path.exists():
            try:
                source: str | None = read_bytes(path, MAX_TEMPLATE_BYTES).decode()
            except UnicodeDecodeError:
                raise CheckpointError(f"{path} is not UTF-8") from None
        else:
            source = _configured(directory / TOKENIZER_CONFIG_FILE)
            path = directory / TOKENIZER_CONFIG_FILE
        return None if source is None else cls(source, special_token_texts(directory), origin=str(path))

    def check(self) -> None:
        """Compile the template; raise CheckpointError naming its file when that fails."""
        with self._lock:
            self._started()

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation, or raise RequestError in the template's own words."""
        own = {
            **_OWN,
            **self._variables,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        kwargs = dict(template_kwargs or {})
        if kwargs:
            self._check_kwargs(kwargs, own)
        variables = own | kwargs
        try:
            request = json.dumps(variables, allow_nan=False).encode()
        except (ValueError, TypeError, RecursionError) as error:
            raise RequestError(
                f"the messages are not plain JSON: {shown(str(error))}", param="messages"
            ) from None
        if len(request) > MAX_MESSAGES_BYTES:
            raise RequestError(
                f"the messages have {len(request)} bytes as JSON, at most {MAX_MESSAGES_BYTES} are taken",
                param="messages",
            )
        with self._lock:
            reply = self._started().ask(request, self._render_s)
        if reply is None:
            raise RequestError(
                f"the chat template did not finish within {self._render_s:g} s on these messages",
                param="messages",
            )
        return self._text(reply)

    def close(self) -> None:
        """End the subprocess; a later render starts another."""
        with self._lock:
            if self._worker is not None:
                self._worker.stop()
                self._worker = None

    def _check_kwargs(self, kwargs: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Refuse what would replace our own variables, and what the template would silently ignore."""
        self.check()
        open_names = sorted(self._reads - own.keys())
        for key in kwargs:
            if key not in open_names:
                why = "is not for requests to set" if key in own else "is nothing this model's template reads"
                raise RequestError(
                    f"chat_template_kwargs: {shown(key)} {why}; it takes {', '.join(open_names) or 'none'}",
                    param="chat_template_kwargs",
                )

    def _started(self) -> _Worker:
        """Return the subprocess with the template compiled; one that did not answer in time is gone."""
        if self._worker is None or not self._worker.is_alive:
            self._worker = _Worker()
            setup = {
                "template": self.source,
                "memory_bytes": WORKER_MEMORY_BYTES,
                "max_bytes": MAX_RENDERED_BYTES,
                "alarm_s": 2 * self._render_s,
            }
            reply = self._worker.ask(json.dumps(setup).encode(), START_S)
            if reply is None:
                raise CheckpointError(f"{self._origin}: the chat template's process did not start")
            if "error" in reply:
                self._worker.stop()
                raise self._unusable(reply)
            self._reads = frozenset(reply["reads"])
        return self._worker

    def _text(self, reply: Mapping[str, Any]) -> str:
        if "text" in reply:
            return str(reply["text"])
        if reply.get("error") == "bad_template":
            raise self._unusable(reply)
        why = {
            "raised": f"refused the messages: {_reason(reply)}",
            "too_large": f"made more than {MAX_RENDERED_BYTES} bytes of these messages",
        }.get(reply.get("error", ""), f"failed on these messages: {_reason(reply)}")
        raise RequestError(f"the chat template {why}", param="messages")

    def _unusable(self, reply: Mapping[str, Any]) -> CheckpointError:
        return CheckpointError(f"{self._origin}: the chat template is not usable: {_reason(reply)}")


class _Worker:
    """The subprocess: no environment, no stderr, a session of its own so that Ctrl-C passes it by."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("template_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,
        )
        self.stop = weakref.finalize(self, _stop, self._process)

    @property
    def is_alive(self) -> bool:
        """Whether it may be asked again."""
        return self.stop.alive and self._process.poll() is None

    def ask(self, request: bytes, limit_s: float) -> dict[str, Any] | None:
        """Return the answer, or None when none came in time: then the process has been ended."""
        timer = threading.Timer(limit_s, self._process.kill)
        timer.daemon = True
        timer.start()
        reply = None
        try:
            reply = self._exchange(request)
        except (OSError, ValueError):  # the pipe broke, or what came was no JSON: the process is gone
            return None
        finally:
            timer.cancel()
            if reply is None:  # also on Ctrl-C: an answer left unread would go to the next request
                self.stop()
        return reply

    def _exchange(self, request: bytes) -> dict[str, Any] | None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(len(request).to_bytes(4, "big") + request)
        stdin.flush()
        size = int.from_bytes(stdout.read(4), "big")
        data = stdout.read(size) if size <= _MAX_REPLY_BYTES else b""
        reply = json.loads(data) if data and len(data) == size else None
        return reply if isinstance(reply, dict) else None


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # unsent bytes for a process that is gone
                continue


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
) -> list[int]:
    """Render a conversation and tokenise it. Special-token text inside messages stays plain text.

    Such text is swapped for random digits before rendering; afterwards the parts of the result are encoded
    one by one, the template's own with control tokens, the swapped texts without.
    """
    swap = _Swap(tokenizer.special_tokens)
    rendered = template.render(
        swap(list(messages)),
        add_generation_prompt=add_generation_prompt,
        template_kwargs=swap(dict(template_kwargs or {})),
    )
    ids: list[int] = []
    for i, part in enumerate(re.split(rf"{swap.nonce}(\d{{6}})", rendered)):
        text = swap.found[int(part)] if i % 2 else part
        if text:
            ids += tokenizer.encode(text, special=i % 2 == 0, add_special=False, max_tokens=max_tokens)
    return ids


class _Swap:
    """Replaces special-token texts by digits: those survive trimming, case and JSON in templates."""

    def __init__(self, special_tokens: frozenset[str]) -> None:
        self.nonce = f"{secrets.randbelow(10**39):039d}"
        self.found: list[str] = []
        by_length = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._special.sub(lambda match: self._digits(match[0]), value)
        if isinstance(value, Mapping):
            return {key: self(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return self._parts(value)
        return value

    def _parts(self, parts: Sequence[Any]) -> list[Any]:
        """Text parts that only together spell a special token are swapped whole."""
        texts = [
            part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)
        ]
        n_alone = sum(len(self._special.findall(text)) for text in texts)
        joined = "".join(texts), "".join(text.strip() for text in texts)
        if all(len(self._special.findall(text)) == n_alone for text in joined):
            return [self(part) for part in parts]
        return [
            {**self(part), "text": self._digits(part["text"])}
            if isinstance(part, Mapping) and isinstance(part.get("text"), str)
            else self(part)
            for part in parts
        ]

    def _digits(self, text: str) -> str:
        if len(self.found) == 10**6:
            raise RequestError("the messages hold a million special-token texts", param="messages")
        self.found.append(text)
        return f"{self.nonce}{len(self.found) - 1:06d}"


def _configured(path: Path) -> str | None:
    """The template in tokenizer_config.json: a string, or the one named "default" of a list."""
    template = read_json(path).get("chat_template") if path.exists() else None
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        if "default" not in named:
            raise CheckpointError(
                f"{path}: chat_template has no entry named default, only {shown(list(named))}"
            )
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path}: chat_template is {shown(template)}; it must be a string")
    if template is not None and len(template.encode(errors="replace")) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"{path}: chat_template has more than {MAX_TEMPLATE_BYTES} bytes")
    return template


def _reason(reply: Mapping[str, Any]) -> str:
    return " ".join(str(reply.get("message")).split())[:_MAX_REASON_CHARS]
