"""`sailfish recipe`: lists, prints and compares the recipes of `sailfish compress`."""

from __future__ import annotations

from typing import Annotated

import typer

from sailfish.cli import tables

recipe = typer.Typer(no_args_is_help=True, help="List, print and compare the recipes of `sailfish compress`.")
_Name = Annotated[str, typer.Argument(metavar="NAME", help="A packaged recipe, or a .yaml file.")]


@recipe.command("list")
def list_recipes() -> None:
    """List the packaged recipes."""
    from sailfish.compress.recipe import load, names

    found = [load(name) for name in names()]
    rows = [
        (one.name, f"{one.bits_per_weight:.3f}", "yes" if one.is_calibrated else "no", one.about)
        for one in found
    ]
    tables.show("Recipes", ("name", "bits", "calibrated", "what it does"), rows, right=("bits",))


@recipe.command("show")
def show(name: _Name) -> None:
    """Print a recipe with every value written out."""
    from sailfish.compress.recipe import load, text

    typer.echo(text(load(name)), nl=False)


@recipe.command("diff")
def diff(
    one: _Name, other: Annotated[str, typer.Argument(metavar="OTHER", help="What it is compared with.")]
) -> None:
    """Print where two recipes differ, every value written out; exit status 1 if they do."""
    from sailfish.compress.recipe import diff as differ
    from sailfish.compress.recipe import load

    found = differ(load(one), load(other))
    if found:
        typer.echo(found)
        raise typer.Exit(1)
