"""What the README says a user can type works as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from live import COMMAND, WAIT_S

from sailfish.build.cache import locate_engine
from sailfish.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
TYPED = sorted(
    {
        line.split("  #")[0].strip()
        for kind, text in BLOCKS
        if kind == "sh"
        for line in text.splitlines()
        if line
    }
    | {
        span
        for row in README.splitlines()
        if row.startswith("|")
        for span in re.findall(r"`(sailfish [^`]*)`", row)
    }
)
ENDLESS = ("sailfish serve", "sailfish chat", "make ")
"""Run by tests of their own; here only checked for existing flags."""
QUICK = ("--samples", "32", "--length", "256", "--eval-windows", "8")
"""Of `compress`: a sixteenth of the text that it reads by itself; every recipe keeps its bounds with it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty place to type in."""
    return tmp_path_factory.mktemp("readme")


def _words(line: str) -> list[str]:
    command, *words = shlex.split(line)[1:]
    quick = QUICK if command == "compress" else ()
    return [*COMMAND, command, *words, *quick]


def test_the_readme_shows_commands() -> None:
    """An empty list would make the tests below pass for nothing."""
    assert len(TYPED) > 8
    assert {line.split()[1] for line in TYPED if line.startswith("sailfish ")} <= set(COMMANDS)


@pytest.mark.parametrize("line", [line for line in TYPED if line.startswith("make ")])
def test_every_make_target_of_the_readme_exists(line: str) -> None:
    """`make -n` fails on an unknown target."""
    subprocess.run(["make", "-n", *line.split()[1:]], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", [x for x in TYPED if x.startswith("sailfish ") and not x.startswith(ENDLESS)]
)
def test_every_command_of_the_readme_runs(line: str, folder: Path) -> None:
    """In an empty folder, as a user would type it, but for the text that `compress` reads."""
    done = subprocess.run(
        _words(line), cwd=folder, capture_output=True, text=True, check=False, timeout=2 * WAIT_S
    )
    allowed = {0, 1} if line.startswith("sailfish doctor") else {0}
    assert done.returncode in allowed, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("line", [x for x in TYPED if x.startswith(("sailfish serve", "sailfish chat"))])
def test_the_flags_of_the_commands_that_go_on_for_ever_exist(line: str) -> None:
    """Only parsed here: tests of their own serve and chat."""
    done = subprocess.run([*_words(line), "--help"], capture_output=True, text=True, check=True)
    for flag in re.findall(r"--[a-z-]+", line):
        assert flag in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("program", [text for kind, text in BLOCKS if kind == "python"])
def test_the_python_of_the_readme_runs(program: str, folder: Path) -> None:
    """Each block as a program of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * WAIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_pictures_of_the_readme_exist() -> None:
    """Links to files of this repository lead somewhere."""
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_packaged_model_is_found_once_it_was_built(folder: Path) -> None:
    """The second look costs no build."""
    environ = {"XDG_CACHE_HOME": str(folder)}
    assert locate_engine("books-4m", environ=environ).is_built
    assert not locate_engine("books-4m", environ=environ).is_built
