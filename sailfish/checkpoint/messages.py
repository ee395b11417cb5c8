"""The messages of a conversation: every field there is, read alike for HTTP, batches and Python."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from sailfish.base.errors import RequestError

T = TypeVar("T")

ShortText = Annotated[str, Meta(max_length=512)]

_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")
_MAX_NAME_CHARS = 64
_HINT = "a message has a role (system, developer, user or assistant) and a content: a text, or text parts"


class TextPart(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A piece of text in a message."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Meta(min_length=1, max_length=1024)]


class Message(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: ShortText | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates know it; `developer` is OpenAI's newer word for system."""
        content = self.content if isinstance(self.content, str) else "\n".join(p.text for p in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message if self.name is None else message | {"name": self.name}


class _Conversation(Struct, frozen=True):
    messages: Annotated[list[Message], Meta(min_length=1)]


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tool_calls": (None, []),
    "tool_call_id": (None,),
    "function_call": (None,),
    "refusal": (None,),
    "audio": (None,),
    "annotations": (None, []),
}
"""A message's fields of OpenAI's that are not here yet, and the values with which they change nothing."""


def read_messages(values: Any) -> list[Message]:
    """Return a conversation's messages; raises RequestError naming `messages[i].field`."""
    if isinstance(values, Sequence) and not isinstance(values, str):
        values = [
            known_fields(Message, NEUTRAL, value, f"messages[{i}].") if isinstance(value, Mapping) else value
            for i, value in enumerate(values)
        ]
    return convert({"messages": values}, _Conversation).messages


def known_fields(
    kind: type[Struct], neutral: Mapping[str, tuple[Any, ...]], value: Mapping[str, Any], where: str = ""
) -> dict[str, Any]:
    """Return the fields of `kind`, without those of absent features that change nothing.

    Raises RequestError for any other field; `where` goes before its name.
    """
    known = kind.__struct_fields__
    kept = {}
    for name, given in value.items():
        if name in known:
            kept[name] = given
        elif name not in neutral:
            short = str(name)[:_MAX_NAME_CHARS]
            near = difflib.get_close_matches(short, known, n=1)
            raise RequestError(
                f"unknown field {where + short!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
                param=where + short,
                code="unknown_parameter",
            )
        elif not any(type(given) is type(same) and given == same for same in neutral[name]):
            raise RequestError(
                f"{where}{name} is not supported yet; leave it out",
                param=where + name,
                code="unsupported_parameter",
            )
    return kept


def convert(value: Any, kind: type[T]) -> T:
    """Turn plain data into a Struct; raises RequestError naming the field at fault."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from None


def _explained(problem: str) -> RequestError:
    path = _PATH.search(problem)
    where = path.group(1) if path else ""
    what = problem[: path.start()] if path else problem
    code = "invalid_type" if ", got `" in what else "invalid_value"
    if found := _UNKNOWN.match(what):
        code, what = "unknown_parameter", f"unknown field {found.group(1)[:_MAX_NAME_CHARS]!r}"
    elif found := _MISSING.match(what):
        where = f"{where}.{found.group(1)}" if where else found.group(1)
        code, what = "missing_required_parameter", "the field is missing"
    return RequestError(
        f"{where}: {what}" if where else what,
        hint=_HINT if where.startswith("messages") else None,
        param=where or None,
        code=code,
    )
