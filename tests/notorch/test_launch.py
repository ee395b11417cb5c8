"""How processes that we started end."""

from __future__ import annotations

import signal
import subprocess
import sys

from sailfish.engine.launch import wait_or_kill


def test_a_process_that_ends_by_itself_is_waited_for() -> None:
    assert wait_or_kill(subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]), 60.0) == 3


def test_a_process_that_does_not_end_in_time_is_killed() -> None:
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert wait_or_kill(process, 0.01) == -signal.SIGKILL
