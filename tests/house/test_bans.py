"""What no file may do, whatever it is for."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import tree

UNPICKLERS = {"pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle", "joblib"}
BANNED_CALLS = {"eval", "exec", "torch.load", "os.system", "os.popen", "breakpoint", "numpy.load", "np.load"}
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".json", ".svg", ".cfg", ""}
UNTRACKED = {".git", ".venv", "node_modules", "__pycache__", "constraints"}
UNTRACKED_AT_ROOT = {"build", ".hypothesis", ".carry", ".whl", "out"}
FOREIGN = re.compile(
    r"/(?:home|root|Users|mnt|wor[k])/[\w.]|pypi\.or[g]|files\.pythonhoste[d]|registry\.npmj[s]|C:\\\\Users"
)


@cache
def _calls() -> list[tuple[Path, ast.Call, str]]:
    return [
        (path, node, tree.dotted(node.func))
        for path in tree.files()
        for node in tree.nodes(path)
        if isinstance(node, ast.Call)
    ]


def _names(path: Path) -> list[tuple[int, str]]:
    nodes = [node for node in tree.nodes(path) if isinstance(node, ast.Attribute | ast.Name)]
    return [(node.lineno, tree.dotted(node)) for node in nodes]


def _written_files() -> Iterator[Path]:
    """Yield the repository's files, without looking into what tools install or keep."""
    for folder, folders, files in os.walk(tree.ROOT):
        skipped = UNTRACKED | (UNTRACKED_AT_ROOT if Path(folder) == tree.ROOT else set())
        folders[:] = [
            name for name in folders if name not in skipped and not name.endswith((".egg-info", "_cache"))
        ]
        yield from filter(Path.is_file, (Path(folder, name) for name in files))


def _logs_traceback(handler: ast.ExceptHandler) -> bool:
    calls = [node for node in ast.walk(handler) if isinstance(node, ast.Call)]
    return any(keyword.arg == "exc_info" for call in calls for keyword in call.keywords)


def test_only_the_command_line_prints() -> None:
    """Everything else logs, raises, or returns."""
    wrong = [
        f"{tree.name(path)}:{call.lineno}"
        for path, call, name in _calls()
        if name == "print" and tree.room(path) != "cli"
    ]
    assert not wrong, wrong


def test_only_one_file_reads_the_environment() -> None:
    """base/sources.py hands the environment to whoever needs it."""
    wrong = [
        f"{tree.name(path)}:{line}"
        for path in tree.files()
        if tree.name(path) != "sailfish/base/sources.py"
        for line, name in [*_names(path), *tree.imports(path)]
        if name in {"os.environ", "os.getenv", "os.putenv"}
    ]
    assert not wrong, wrong


def test_nothing_unpickles_or_evaluates() -> None:
    """A model directory, a request or a message is data, never code."""
    wrong = [f"{tree.name(p)}:{c.lineno} {name}" for p, c, name in _calls() if name in BANNED_CALLS]
    for path in tree.files():
        wrong += [
            f"{tree.name(path)}:{line} imports {module}"
            for line, module in tree.imports(path)
            if module.split(".")[0] in UNPICKLERS
        ]
    assert not wrong, wrong


def test_broad_excepts_stand_at_process_edges_with_a_reason() -> None:
    """A handler of everything raises again, logs the traceback, or carries `# noqa: BLE001 - <reason>`."""
    wrong = []
    for path in tree.files():
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in tree.nodes(path):
            if not isinstance(node, ast.ExceptHandler):
                continue
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = any(k is None or tree.dotted(k) in {"Exception", "BaseException"} for k in kinds)
            raises_again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            is_reasoned = "# noqa: BLE001 - " in lines[node.lineno - 1]
            if broad and not (raises_again or is_reasoned or _logs_traceback(node)):
                wrong.append(f"{tree.name(path)}:{node.lineno}")
    assert not wrong, wrong


def test_the_tree_names_no_machine_and_no_package_index() -> None:
    """Nothing tracked may depend on one person's folders or one place's mirror."""
    wrong = []
    for path in _written_files():
        if path.suffix not in TEXT_SUFFIXES or path.name == "tokenizer.json":
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        wrong += [f"{tree.name(path)}: {match.group(0)}" for match in FOREIGN.finditer(text)]
    assert not wrong, wrong
