"""`sailfish compress`: a checkpoint becomes a smaller one, with a report of what that cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sailfish.base.errors import ConfigError
from sailfish.base.sources import environment
from sailfish.cli import opening, tables
from sailfish.cli.options import AsJson, Download, Offline, WorkDevice

if TYPE_CHECKING:
    from sailfish.compress.report import Report

_DEFAULT = "w4a16-gptq"


_Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A dense checkpoint: a directory, a Hub id, or books-4m.")
]
_Recipes = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe",
        "-r",
        metavar="NAME",
        help=f"A packaged recipe or a .yaml file; may be repeated. Default: {_DEFAULT}.",
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="DIR", help="The new checkpoint; of several recipes a folder of them."
    ),
]
_Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help='Text, JSON lines with "text" (.xz, .gz too) or ids (.json). Default: a packaged text.',
    ),
]
_Evaluation = Annotated[
    Path | None,
    typer.Option(
        "--eval", metavar="FILE", help="Text to measure quality over. Default: the end of the calibration's."
    ),
]
_Samples = Annotated[
    int | None,
    typer.Option("--samples", min=1, metavar="N", help="Calibration windows. Default: the recipe's."),
]
_Length = Annotated[
    int | None,
    typer.Option("--length", min=2, metavar="TOKENS", help="Tokens of a window. Default: the recipe's."),
]
_EvalWindows = Annotated[
    int,
    typer.Option("--eval-windows", min=2, metavar="N", help="Windows that quality is measured over."),
]
_Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help="Draws the calibration windows. Default: the recipe's."),
]
_Strict = Annotated[bool, typer.Option("--strict", help="Fail rather than fall back to less.")]
_MustPay = Annotated[
    bool, typer.Option("--must-pay", help="Refuse a format that is no faster here where the parent fits.")
]
_Budget = Annotated[
    str | None,
    typer.Option("--budget", metavar="BITS", help="Mean bits of a weight, as in 4.25bpw; matrices differ."),
]
_MaxKl = Annotated[
    float | None,
    typer.Option(
        "--max-kl", min=0.0, metavar="NATS", help="Spend as few bits as keep this divergence; refuse more."
    ),
]
_Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="float32|bfloat16",
        help="Of activations. Default: float32 on the CPU, else bfloat16.",
    ),
]


def compress(
    model: _Model,
    recipe: _Recipes = None,
    out: _Out = None,
    calibration: _Calibration = None,
    evaluation: _Evaluation = None,
    samples: _Samples = None,
    length: _Length = None,
    eval_windows: _EvalWindows = 16,
    seed: _Seed = None,
    strict: _Strict = False,
    must_pay: _MustPay = False,
    budget: _Budget = None,
    max_kl: _MaxKl = None,
    device: WorkDevice = None,
    dtype: _Dtype = None,
    as_json: AsJson = False,
    offline: Offline = False,
    download: Download = False,
) -> None:
    """Turn a dense checkpoint into a smaller one that other tools load too, and tell what it cost.

    Block by block: one block's weights and the windows' states are in memory. `sailfish recipe` lists and
    prints the recipes. compression.html beside the weights is the report.
    """
    from sailfish.compress.recipe import load

    source = opening.locate(model, offline=offline, download=download)
    names = recipe or [_DEFAULT]
    found = [load(name) for name in names]
    if out is None:
        stem = source.resolve().name
        out = Path(f"{stem}-{found[0].name}" if len(found) == 1 else f"{stem}-compressed")
    if len({one.name for one in found}) < len(found):
        raise ConfigError("a recipe is given twice", hint="give each once", param="recipe")
    changes = {"samples": samples, "tokens": length, "seed": seed}
    from sailfish.compress.many import make_all

    with opening.progress(as_bytes=False) as tell:
        reports = make_all(
            source,
            out,
            found,
            changes={key: value for key, value in changes.items() if value is not None},
            calibration=calibration,
            evaluation=evaluation,
            n_evaluation=eval_windows,
            strict=strict,
            must_pay=must_pay,
            budget_bits=None if budget is None else _bits(budget),
            max_kl=max_kl,
            device=device,
            dtype=dtype,
            environ=environment(),
            tell=tell,
        )
    if as_json:
        tables.show_json(reports)
        return
    _show(reports)
    typer.echo(f"wrote {out}; its report: {out / 'compression.html'}")


def _bits(text: str) -> float:
    try:
        bits = float(text.strip().lower().removesuffix("bpw"))
    except ValueError:
        bits = 0.0
    if not 0 < bits <= 16:
        raise ConfigError(
            f"a budget of {text!r} is none", hint="write bits a weight: 4.25bpw", param="budget"
        )
    return bits


def _show(reports: list[Report]) -> None:
    from sailfish.compress.page import side_by_side

    first = reports[0]
    heads, rows = side_by_side(reports)
    tables.show(
        f"{first.parent} on {first.device}: {first.quality.n_tokens:,} tokens of {first.quality.text}",
        heads,
        rows,
        right=heads[1:],
    )
    for report in reports:
        for warning in report.warnings:
            opening.say(f"warning: {report.recipe['name']}: {warning}")
        for fallback in report.fallbacks:
            opening.say(f"fallback: {report.recipe['name']}: {fallback.where}: {fallback.why}")
