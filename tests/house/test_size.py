"""Files and functions stay short enough to read in one go."""

from __future__ import annotations

import tree

FILE_LINES, KERNEL_FILE_LINES = 400, 500
FUNCTION_LINES, KERNEL_FUNCTION_LINES = 80, 150

LONGER_FILES: dict[str, str] = {}
"""Path -> why it may be longer."""
LONGER_FUNCTIONS: dict[str, str] = {}
"""Path:function -> why it may be longer."""


def test_files_stay_within_the_guide() -> None:
    """400 lines a file, 500 for kernels."""
    wrong = []
    for path in tree.files():
        limit = KERNEL_FILE_LINES if tree.room(path) == "kernels" else FILE_LINES
        n_lines = len(path.read_text(encoding="utf-8").splitlines())
        if n_lines > limit and tree.name(path) not in LONGER_FILES:
            wrong.append(f"{tree.name(path)} has {n_lines} lines; the guide is {limit}")
    assert not wrong, "\n".join(wrong)


def test_functions_stay_within_the_guide() -> None:
    """80 lines a function, 150 for kernels."""
    wrong = []
    for path in tree.files():
        limit = KERNEL_FUNCTION_LINES if tree.room(path) == "kernels" else FUNCTION_LINES
        for name, node in tree.functions(tree.tree(path)):
            n_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if n_lines > limit and f"{tree.name(path)}:{name}" not in LONGER_FUNCTIONS:
                wrong.append(f"{tree.name(path)}:{name} has {n_lines} lines; the guide is {limit}")
    assert not wrong, "\n".join(wrong)


def test_every_exception_is_still_needed() -> None:
    """An entry for a file or function that is gone, or short again, is removed."""
    names = {f"{tree.name(p)}:{n}" for p in tree.files() for n, _ in tree.functions(tree.tree(p))}
    assert set(LONGER_FUNCTIONS) <= names
    assert set(LONGER_FILES) <= {tree.name(path) for path in tree.files()}
