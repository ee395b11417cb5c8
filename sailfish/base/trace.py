"""Records which functions of this package a process enters: the measure behind `sailfish walk`.

Every traced process shares one small switch file. Its first byte turns recording on and off for all of
them at once, through shared memory, so that a walk starts with the request and ends with its answer.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGE_DIR = str(Path(__file__).parents[1]) + os.sep
SWITCH_NAME = "switch"
_NOT_FUNCTIONS = ("<module>",)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Entered:
    """A function that some process entered: its lines are first .. last, both counted."""

    at_ns: int
    """When it was first entered, on the clock that all processes share."""
    file: str
    """Path relative to the package."""
    first_line: int
    last_line: int
    function: str

    def holds(self, other: Entered) -> bool:
        """Return whether the other function's lines are among this one's."""
        return (
            self.file == other.file
            and self.first_line <= other.first_line <= other.last_line <= self.last_line
        )


class Switch:
    """The byte shared by all processes of one walk: they record while it is 1."""

    def __init__(self, trace_dir: Path) -> None:
        path = trace_dir / SWITCH_NAME
        if not path.exists():
            path.write_bytes(b"\0")
        with path.open("r+b") as file:
            self._byte = mmap.mmap(file.fileno(), 1)

    def is_on(self) -> bool:
        """Return whether recording is on."""
        return self._byte[0] == 1

    def turn(self, on: bool) -> None:
        """Turn recording on or off in every process."""
        self._byte[0] = int(on)


def start(trace_dir: Path) -> None:
    """Trace this process and its threads into `trace_dir`, one JSON line at each function's first entry."""
    switch = Switch(trace_dir)
    out = (trace_dir / f"{os.getpid()}.jsonl").open("a", buffering=1, encoding="utf-8")
    seen: set[CodeType] = set()

    def entered(code: CodeType) -> None:
        if not switch.is_on() or code in seen:
            return
        seen.add(code)
        if code.co_name not in _NOT_FUNCTIONS:
            file = code.co_filename[len(PACKAGE_DIR) :]
            row = [time.monotonic_ns(), file, code.co_firstlineno, _last_line(code), code.co_qualname]
            out.write(json.dumps(row) + "\n")

    if sys.version_info >= (3, 12):
        _monitor(entered)
    else:
        _profile(entered)


def _profile(entered: Callable[[CodeType], None]) -> None:
    def hook(frame: FrameType, event: str, _arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE_DIR):
            entered(frame.f_code)

    threading.setprofile(hook)
    sys.setprofile(hook)


def _monitor(entered: Callable[[CodeType], None]) -> None:
    monitoring = sys.monitoring  # type: ignore[attr-defined,unused-ignore]
    tool = monitoring.PROFILER_ID
    monitoring.use_tool_id(tool, "sailfish walk")

    def hook(code: CodeType, _offset: int) -> Any:
        if not code.co_filename.startswith(PACKAGE_DIR):
            return monitoring.DISABLE
        return entered(code)

    events = monitoring.events
    for event in (events.PY_START, events.PY_RESUME):
        monitoring.register_callback(tool, event, hook)
    monitoring.set_events(tool, events.PY_START | events.PY_RESUME)


def _last_line(code: CodeType) -> int:
    lines = [end for _, end, _, _ in code.co_positions() if end is not None]
    nested = [_last_line(const) for const in code.co_consts if isinstance(const, CodeType)]
    return max([code.co_firstlineno, *lines, *nested])


def read(trace_dir: Path) -> list[Entered]:
    """Return what every process of a walk entered, in order, each function once."""
    rows = [
        Entered(at_ns=row[0], file=row[1], first_line=row[2], last_line=row[3], function=row[4])
        for path in trace_dir.glob("*.jsonl")
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())
    ]
    first: dict[tuple[str, int, str], Entered] = {}
    for row in sorted(rows):
        first.setdefault((row.file, row.first_line, row.function), row)
    return list(first.values())


def line_count(entered: list[Entered]) -> int:
    """Return how many different lines the functions span together."""
    return len({(row.file, line) for row in entered for line in range(row.first_line, row.last_line + 1)})
