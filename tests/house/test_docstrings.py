"""Every file and every public name says what it is."""

from __future__ import annotations

import ast

import tree


def _public(node: ast.AST, inside: str = "") -> list[tuple[str, ast.AST]]:
    found: list[tuple[str, ast.AST]] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            found += [(inside + child.name, child), *_public(child, f"{inside}{child.name}.")]
        elif isinstance(child, tree.Function) and not child.name.startswith("_"):
            found.append((inside + child.name, child))
    return found


def _is_overload(node: ast.AST) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return any(tree.dotted(decorator) in {"overload", "typing.overload"} for decorator in decorators)


def test_every_file_begins_with_a_docstring() -> None:
    """One sentence: what the file does."""
    wrong = [tree.name(path) for path in tree.files() if not ast.get_docstring(tree.tree(path))]
    assert not wrong, wrong


def test_every_public_class_and_function_has_a_docstring() -> None:
    """Methods of public classes too."""
    wrong = [
        f"{tree.name(path)}:{name}"
        for path in tree.files()
        for name, node in _public(tree.tree(path))
        if not _is_overload(node) and not ast.get_docstring(node)  # type: ignore[arg-type]
    ]
    assert not wrong, wrong


def test_every_file_postpones_annotations() -> None:
    """`from __future__ import annotations` wherever there is code."""
    wrong = [
        tree.name(path)
        for path in tree.files()
        if len(tree.tree(path).body) > 1
        and any(isinstance(n, ast.AnnAssign | ast.arg) for n in tree.nodes(path))
        and not any(module == "__future__.annotations" for _, module in tree.imports(path))
    ]
    assert not wrong, wrong
