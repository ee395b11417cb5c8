"""`sailfish convert`: a quantised checkpoint in another tool's format, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from sailfish.base.errors import ConfigError
from sailfish.checkpoint.formats.convert import Target, layout_of, restore
from sailfish.checkpoint.formats.convert import convert as rewrite
from sailfish.checkpoint.formats.tensors import FloatType
from sailfish.cli import opening
from sailfish.cli.options import Download, Offline

_DENSE = "dense"
_TARGETS: dict[str, Target] = {name: name for name in get_args(Target)}
_DTYPES: dict[str, FloatType] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def convert(
    model: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A quantised checkpoint: a directory, or org/name.")
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help=f"One of {', '.join([*_TARGETS, _DENSE])}.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The new directory.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="Of dense weights: float32 (exact), bfloat16 or float16 (rounded). Default: float32.",
        ),
    ] = None,
    offline: Offline = False,
    download: Download = False,
) -> None:
    """Write a quantised checkpoint in another format; every weight stays the same number.

    What a format cannot hold (act-order in awq, 8 bits in awq, rounded activations in gptq) is refused with
    the layer and the reason, and nothing is written. `dense` writes the weights out as plain numbers, which
    any tool reads.
    """
    if to != _DENSE and to not in _TARGETS:
        raise ConfigError(
            f"format {to!r} is not written", hint=f"use one of {', '.join([*_TARGETS, _DENSE])}", param="to"
        )
    if dtype is not None and to != _DENSE:
        raise ConfigError("--dtype is that of dense weights", hint="leave it out", param="dtype")
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(
            f"dtype {dtype!r} is not written", hint=f"use one of {', '.join(_DTYPES)}", param="dtype"
        )
    source = opening.locate(model, offline=offline, download=download)
    with opening.progress() as tell:

        def told(done: int, total: int) -> None:
            tell("convert", done, total)

        if to == _DENSE:
            restore(source, out, _DTYPES[dtype or "float32"], told)
            typer.echo(f"wrote {out}: dense, {dtype or 'float32'}")
            return
        layout = layout_of(_TARGETS[to], source)
        rewrite(source, out, layout, told)
    typer.echo(f"wrote {out}: {layout}, every weight the same number as in {source}")
