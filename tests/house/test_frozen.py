"""Names that users write down: changing one is a decision, made by editing the list beside this test."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import tree
import typer

import sailfish
from sailfish.base import errors, sources
from sailfish.cli import aliases
from sailfish.cli.main import COMMANDS, application


def _frozen(name: str) -> list[str]:
    lines = (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _cli() -> list[str]:
    rows = []
    for name in COMMANDS:
        root = typer.main.get_command(application([name]))
        command = root.commands[name]  # type: ignore[attr-defined]
        parts = getattr(command, "commands", {"": command})
        for part, found in parts.items():
            for parameter in found.params:
                spellings = [*parameter.opts, *parameter.secondary_opts]
                rows.append(" ".join([name, *filter(None, [part]), "/".join(spellings)]))
    rows += [f"alias {alias} = {ours}" for alias, ours in aliases.ALIASES.items()]
    return sorted(rows)


def _error_codes() -> list[str]:
    for module in pkgutil.walk_packages([str(tree.PACKAGE / "base")], "sailfish.base."):
        importlib.import_module(module.name)
    found = [errors.SailfishError]
    for kind in found:
        found += kind.__subclasses__()
    return sorted(
        {f"{kind.__name__} {kind.code} http={kind.http_status} exit={kind.exit_code}" for kind in found}
    )


def test_the_command_line_is_the_frozen_one() -> None:
    """Commands, flags and aliases."""
    assert _cli() == _frozen("cli_flags.txt")


def test_the_public_names_are_the_frozen_ones() -> None:
    """`import sailfish` offers these, and every one of them can be imported."""
    assert sorted(sailfish.__all__) == _frozen("public_names.txt")
    assert all(getattr(sailfish, name) is not None for name in sailfish.__all__)
    assert set(dir(sailfish)) == set(sailfish.__all__)


def test_the_error_codes_are_the_frozen_ones() -> None:
    """Clients branch on codes and statuses, scripts on exit codes."""
    assert _error_codes() == _frozen("error_codes.txt")


def test_the_settings_are_the_frozen_ones() -> None:
    """Keys of the settings file; upper-cased behind SAILFISH_ they are the environment's names."""
    rows = [
        f"{name}.{field}" for name, table in sources.TABLES.items() for field in table.__dataclass_fields__
    ]
    assert sorted(rows) == _frozen("settings.txt")
