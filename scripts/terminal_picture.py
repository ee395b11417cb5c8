"""Draws docs/img/demo.svg from a real terminal session: runs the commands and records what they print."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

SESSION = (
    "sailfish plan books-4m --target h200 --ctx 2k",
    "sailfish demo",
)
PICTURE = Path(__file__).parents[1] / "docs" / "img" / "demo.svg"
_COLUMNS = 108
_FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
"""The picture loads nothing from elsewhere; the viewer's own monospace font serves."""


def main() -> None:
    """Run the session and write the picture."""
    console = Console(record=True, width=_COLUMNS, file=sys.stderr, force_terminal=True)
    for line in SESSION:
        console.print(Text.assemble(("$ ", "green"), (line, "bold")))
        words = [sys.executable, "-m", "sailfish.cli.main", *shlex.split(line)[1:]]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
        console.print(Text("\n".join(row.rstrip() for row in done.stdout.rstrip().splitlines()) + "\n"))
    svg = console.export_svg(title="sailfish").replace(str(Path.home()), "~")
    PICTURE.write_text(_FONTS.sub("", svg), encoding="utf-8")


if __name__ == "__main__":
    main()
