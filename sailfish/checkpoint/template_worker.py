"""Render one chat template, request after request, in a process of its own that may be killed at any time.

Run as a script by `template.py`; it imports nothing of Sailfish. Frames on stdin and stdout are a 4-byte
big-endian length and a JSON object. The first frame in holds the template and the limits; the first one out,
which names the template reads.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from datetime import datetime
from typing import Any, BinaryIO, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Raised(jinja2.TemplateError):
    """The template itself refused the messages, through raise_exception."""


class _TooLarge(Exception):
    """The rendered text passed the cap."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it is only its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def read_frame(stream: BinaryIO) -> Any:
    """Return the next frame's value, or None at the end of the stream."""
    size = int.from_bytes(stream.read(4), "big")
    data = stream.read(size)
    return json.loads(data) if size and len(data) == size else None


def write_frame(stream: BinaryIO, value: Any) -> None:
    """Write one frame."""
    data = json.dumps(value).encode()
    stream.write(len(data).to_bytes(4, "big") + data)
    stream.flush()


def environment() -> jinja2.Environment:
    """Return the sandbox with the names that Hugging Face chat templates rely on."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = _raise
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return sandbox


def render(template: jinja2.Template, variables: dict[str, Any], max_bytes: int) -> str:
    """Render, giving up as soon as the text is too large."""
    pieces, n_bytes = [], 0
    for piece in template.generate(variables):
        n_bytes += len(piece.encode(errors="surrogatepass"))
        if n_bytes > max_bytes:
            raise _TooLarge
        pieces.append(piece)
    return "".join(pieces)


def main() -> None:
    """Serve until stdin closes."""
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    setup = read_frame(stdin)
    _limit_resources(setup["memory_bytes"])
    sandbox = environment()
    try:
        reads = sorted(jinja2.meta.find_undeclared_variables(sandbox.parse(setup["template"])))
        template = sandbox.from_string(setup["template"])
    except Exception as error:  # noqa: BLE001 - process edge: whatever is wrong with it becomes a reply
        write_frame(stdout, {"error": "bad_template", "message": f"{type(error).__name__}: {error}"[:2000]})
        return
    write_frame(stdout, {"reads": reads})
    while (variables := read_frame(stdin)) is not None:
        # Should the parent die meanwhile, nobody else would end an endless template.
        signal.setitimer(signal.ITIMER_REAL, setup["alarm_s"])
        try:
            reply = {"text": render(template, variables, setup["max_bytes"])}
        except Exception as error:  # noqa: BLE001 - process edge: whatever a template raises becomes a reply
            reply = {"error": _kind(error), "message": f"{type(error).__name__}: {error}"[:2000]}
            if isinstance(error, _Raised):
                reply["message"] = str(error)[:2000]
        signal.setitimer(signal.ITIMER_REAL, 0)
        write_frame(stdout, reply)


def _kind(error: Exception) -> str:
    if isinstance(error, _Raised):
        return "raised"
    if isinstance(error, _TooLarge | MemoryError):
        return "too_large"
    if isinstance(error, SecurityError):
        return "bad_template"
    return "failed"


def _limit_resources(memory_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows; the wall clock and the output cap still hold
        return
    limits = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    for kind, limit in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS knows RLIMIT_AS but may refuse to set it
            resource.setrlimit(kind, (limit, limit))


def _raise(message: object) -> NoReturn:
    raise _Raised(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; templates were written against this one."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


if __name__ == "__main__":
    main()
