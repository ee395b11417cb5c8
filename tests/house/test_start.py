"""The command line starts at once, and without torch."""

from __future__ import annotations

import resource
import subprocess
import sys

from sailfish.cli.main import COMMANDS

MAX_HELP_S, MAX_HELP_STARTS = 0.150, 6
"""Processor seconds; and on a slower machine, how many starts of a bare interpreter."""
_BLOCKED = """
import sys
sys.modules["torch"] = None  # an import of torch fails
sys.argv = ["sailfish", *sys.argv[1:]]
from sailfish.cli.main import main
main()
"""
_EACH = """
import sys
sys.modules["torch"] = None
from sailfish.cli.main import COMMANDS, main
for name in COMMANDS:
    sys.argv = ["sailfish", name, "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, name
"""


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _run(program: str, *words: str) -> tuple[float, str]:
    """Return (processor seconds, text) of a program: what it takes on a machine that does nothing else."""
    start_s = _cpu_s()
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return _cpu_s() - start_s, done.stdout


def test_help_takes_less_than_150_ms_and_imports_no_torch() -> None:
    """The best of three: other programs only ever add to what the processor does."""
    runs = [(_run("pass"), _run(_BLOCKED, "--help")) for _ in range(3)]
    assert all(name in runs[0][1][1] for name in COMMANDS)
    bare_s, help_s = (min(seconds for seconds, _ in kind) for kind in zip(*runs, strict=True))
    assert help_s < max(MAX_HELP_S, MAX_HELP_STARTS * bare_s)


def test_every_command_explains_itself_without_torch() -> None:
    """Parsing a command's flags loads its module, which must not pull in torch: in one process, for speed."""
    done = subprocess.run([sys.executable, "-c", _EACH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"Usage: sailfish {name}" in done.stdout, done.stdout + done.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Public names are loaded when they are first used."""
    program = "import sys, sailfish; print({'torch', 'numpy', 'tokenizers', 'starlette'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
