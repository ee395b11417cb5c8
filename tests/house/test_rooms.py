"""A room imports only rooms before it, and torch stays where it belongs."""

from __future__ import annotations

import tree

TORCH_FREE_ROOMS = {"base", "checkpoint", "plan", "artifact", "build", "serve", "deploy", "cli", ""}
TORCH_FREE_ENGINE_FILES = {
    "api.py", "client.py", "step.py", "sequence.py", "scheduler.py", "admission.py", "loop.py", "wire.py",
    "launch.py", "kv/blocks.py", "kv/prefix.py",
}  # fmt: skip
DATA_ROOMS = {"data", "version"}


def test_every_folder_of_the_package_is_a_known_room() -> None:
    """A new room needs its place in the order first."""
    rooms = {tree.room(path) for path in tree.files()} - {"", "data"}
    assert rooms <= set(tree.ROOMS), rooms - set(tree.ROOMS)


def test_a_room_imports_only_rooms_before_it() -> None:
    """The order is the list in docs/architecture.md; imports inside functions count too."""
    wrong = []
    for path in tree.files():
        here = tree.room(path)
        if here not in tree.ROOMS:
            continue
        for line, module in tree.imports(path):
            parts = module.split(".")
            if parts[0] != "sailfish" or len(parts) < 2 or parts[1] in DATA_ROOMS:
                continue
            if parts[1] not in tree.ROOMS or tree.ROOMS.index(parts[1]) > tree.ROOMS.index(here):
                wrong.append(f"{tree.name(path)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_torch_free_code_does_not_import_torch_anywhere() -> None:
    """Servers, plans and the scheduler must run and be tested without torch."""
    wrong = []
    for path in tree.files():
        here = tree.room(path)
        inner = path.relative_to(tree.PACKAGE / "engine").as_posix() if here == "engine" else ""
        if here not in TORCH_FREE_ROOMS and inner not in TORCH_FREE_ENGINE_FILES:
            continue
        wrong += [
            f"{tree.name(path)}:{line} imports {module}"
            for line, module in tree.imports(path)
            if module.split(".")[0] in {"torch", "transformers", "triton"}
        ]
    assert not wrong, "\n".join(wrong)


def test_only_the_cuda_rooms_name_torch_cuda() -> None:
    """Device calls live in hardware, kernels, and the three engine files that own a device."""
    allowed = {"engine/transfer.py", "engine/runner.py", "engine/worker.py"}
    wrong = []
    for path in tree.files():
        if tree.room(path) in {"hardware", "kernels"} or path.relative_to(tree.PACKAGE).as_posix() in allowed:
            continue
        wrong += [
            f"{tree.name(path)}:{node.lineno}"
            for node in tree.nodes(path)
            if tree.dotted(node).startswith("torch.cuda")
        ]
    assert not wrong, "\n".join(wrong)
