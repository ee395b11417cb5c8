"""Runs one recipe or several over a checkpoint, and writes one page that shows them side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import msgspec

from sailfish.base.errors import ConfigError, SailfishError
from sailfish.compress.device import find_device
from sailfish.compress.driver import Tell
from sailfish.compress.make import Request, make, within
from sailfish.compress.page import page
from sailfish.compress.parent import ParentStates
from sailfish.compress.recipe import Recipe
from sailfish.compress.report import PAGE_FILE, Report


def make_all(
    source: Path,
    out: Path,
    recipes: Sequence[Recipe],
    *,
    changes: Mapping[str, int],
    calibration: Path | None,
    evaluation: Path | None,
    n_evaluation: int,
    strict: bool,
    must_pay: bool,
    budget_bits: float | None,
    max_kl: float | None,
    device: str | None,
    dtype: str | None,
    environ: Mapping[str, str],
    tell: Tell,
) -> list[Report]:
    """Return the report of each recipe, done on this machine's `device`; None takes a GPU if one is there.

    One recipe makes the directory `out`; several make directories of their names in it, and a page that
    compares them: those that were done before an error stay. `changes` are fields of the recipes'
    calibration. With a mean of `budget_bits` a weight or a `max_kl` each matrix gets the bits that it needs.
    Raises as `make` does.
    """
    on, hardware = find_device(device, dtype, environ)
    if len({msgspec.structs.replace(recipe.calibration, **changes).tokens for recipe in recipes}) > 1:
        raise ConfigError(
            "the recipes are measured over windows of different lengths, which do not compare",
            hint="give --length for all",
            param="length",
        )
    reports: list[Report] = []
    parent = ParentStates()
    with _folder(out, reports) if len(recipes) > 1 else nullcontext():
        for recipe in recipes:
            wanted = msgspec.structs.replace(recipe.calibration, **changes)
            request = Request(
                source=source,
                recipe=msgspec.structs.replace(recipe, calibration=wanted),
                calibration=calibration,
                evaluation=evaluation,
                n_evaluation=n_evaluation,
                on=on,
                device_name=hardware.name,
                free_bytes=hardware.free_bytes,
                strict=strict,
                must_pay=must_pay,
                parent=parent,
            )
            its = out if len(recipes) == 1 else out / recipe.name

            def told(what: str, done: int, total: int, name: str = recipe.name) -> None:
                tell(f"{name}: {what}", done, total)

            if budget_bits is not None or max_kl is not None:
                request = within(request, budget_bits, max_kl, told)
            reports.append(make(request, its, told))
    return reports


@contextmanager
def _folder(out: Path, reports: list[Report]) -> Iterator[None]:
    """Make the folder of several recipes; those that were done stay in it, whatever stops the rest."""
    if out.exists():
        raise ConfigError(f"{out} exists already", hint="name a directory that does not")
    out.mkdir(parents=True)
    try:
        yield
    except SailfishError as error:
        done = ", ".join(str(out / str(report.recipe["name"])) for report in reports)
        error.hint = "; ".join(words for words in (error.hint, done and f"{done} stays") if words)
        raise
    finally:
        if reports:
            (out / PAGE_FILE).write_text(page(reports), encoding="utf-8")
        else:
            out.rmdir()
