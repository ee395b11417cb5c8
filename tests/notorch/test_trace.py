"""The tracer behind `sailfish walk`: records only what runs while its switch is on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sailfish.base import trace
from sailfish.base.trace import Entered

_PROGRAM = """
import sys, threading
from pathlib import Path
from sailfish.base import errors, trace, units
trace_dir = Path(sys.argv[1])
trace.start(trace_dir)
switch = trace.Switch(trace_dir)
units.format_count(1)
switch.turn(True)
units.format_bytes(1)
thread = threading.Thread(target=units.parse_bytes, args=("1",))
thread.start(); thread.join()
switch.turn(False)
units.format_duration(1)
"""


def test_functions_entered_while_on_are_recorded_in_every_thread(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _PROGRAM, str(tmp_path)], check=True)
    names = {row.function for row in trace.read(tmp_path) if row.file == "base/units.py"}
    assert {"format_bytes", "parse_bytes"} <= names
    assert not {"format_count", "format_duration"} & names


def test_the_recorded_lines_are_those_of_the_source(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _PROGRAM, str(tmp_path)], check=True)
    [row] = [row for row in trace.read(tmp_path) if row.function == "format_bytes"]
    lines = (Path(trace.PACKAGE_DIR) / row.file).read_text(encoding="utf-8").splitlines()
    assert lines[row.first_line - 1].startswith("def format_bytes(")
    assert lines[row.last_line - 1].startswith("    return ")


def test_a_line_that_two_functions_share_counts_once() -> None:
    outer = Entered(at_ns=1, file="a.py", first_line=1, last_line=10, function="outer")
    inner = Entered(at_ns=2, file="a.py", first_line=4, last_line=6, function="outer.<locals>.inner")
    other = Entered(at_ns=3, file="b.py", first_line=4, last_line=6, function="other")
    assert trace.line_count([outer, inner, other]) == 13
    assert outer.holds(inner)
    assert not outer.holds(other)


def test_functions_come_in_the_order_of_their_first_entry(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _PROGRAM, str(tmp_path)], check=True)
    names = [row.function for row in trace.read(tmp_path)]
    assert names.index("format_bytes") < names.index("parse_bytes") < names.index("_scaled")
    assert len(names) == len(set(names))
