"""`sailfish distill`: a student learns to answer as its teacher does, with a report of what it gained."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sailfish.base.config import EngineConfig
from sailfish.base.sources import environment
from sailfish.base.units import format_duration
from sailfish.build.cache import find_or_build
from sailfish.cli import opening, tables
from sailfish.cli.options import AsJson, Download, Offline, WorkDevice
from sailfish.engine.api import SamplingParams
from sailfish.engine.sync import Engine

if TYPE_CHECKING:
    from sailfish.compress.distill.report import Report

_ALL = 2**31 - 1


class Divergence(StrEnum):
    """What of the teacher's logits is matched."""

    kl = "kl"
    tvd = "tvd"


class Zeros(StrEnum):
    """What becomes of a pruned student's zeros."""

    auto = "auto"
    free = "free"


_Teacher = Annotated[
    str, typer.Option("--teacher", "-t", metavar="MODEL", help="The dense checkpoint to learn from.")
]
_Student = Annotated[
    str,
    typer.Option(
        "--student", "-s", metavar="MODEL", help="The dense checkpoint to train; it is not changed."
    ),
]
_Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The new checkpoint.")]
_Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help='Text, JSON lines with "text" (.xz, .gz too) or ids (.json). Default: a packaged text.',
    ),
]
_Evaluation = Annotated[
    Path | None,
    typer.Option("--eval", metavar="FILE", help="Text to measure on. Default: the end of the data."),
]
_EvalWindows = Annotated[
    int, typer.Option("--eval-windows", min=2, metavar="N", help="Windows that it is measured over.")
]
_Sampled = Annotated[
    int,
    typer.Option(
        "--sampled-from-teacher",
        min=0,
        metavar="TOKENS",
        help="Learn also from so much text that the teacher writes on beginnings of the data.",
    ),
]
_Steps = Annotated[int, typer.Option("--steps", min=1, metavar="N", help="Updates of the weights.")]
_Batch = Annotated[int, typer.Option("--batch", min=1, metavar="N", help="Windows of a step.")]
_Length = Annotated[int, typer.Option("--length", min=2, metavar="TOKENS", help="Tokens of a window.")]
_Lr = Annotated[
    float, typer.Option("--lr", metavar="RATE", help="The highest rate, after the warm-up; down as a cosine.")
]
_Divergence = Annotated[
    Divergence,
    typer.Option(
        "--divergence", help="kl, or tvd: total variation, 1 less the acceptance of a draft's tokens."
    ),
]
_Alpha = Annotated[
    float,
    typer.Option(
        "--alpha", min=0.0, max=1.0, metavar="SHARE", help="Of the divergence; the rest is cross-entropy."
    ),
]
_Temperature = Annotated[
    float, typer.Option("--temperature", metavar="T", help="Of both models' logits in the divergence.")
]
_KeepZeros = Annotated[
    Zeros,
    typer.Option("--keep-zeros", help="auto: matrices that were pruned keep their zeros; free: none does."),
]
_Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Draws the windows and their order.")]
_SaveEvery = Annotated[
    int,
    typer.Option("--save-every", min=1, metavar="STEPS", help="Keep the state in DIR.state so often."),
]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on from DIR.state, as if it had never stopped.")]
_Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="float32|bfloat16",
        help="Of activations; weights are trained in float32. Default: float32 on the CPU, else bfloat16.",
    ),
]


def distill(
    teacher: _Teacher,
    student: _Student,
    out: _Out,
    data: _Data = None,
    evaluation: _Evaluation = None,
    eval_windows: _EvalWindows = 16,
    sampled_from_teacher: _Sampled = 0,
    steps: _Steps = 1000,
    batch: _Batch = 8,
    length: _Length = 512,
    lr: _Lr = 2e-4,
    divergence: _Divergence = Divergence.kl,
    alpha: _Alpha = 0.9,
    temperature: _Temperature = 1.0,
    keep_zeros: _KeepZeros = Zeros.auto,
    seed: _Seed = 0,
    save_every: _SaveEvery = 200,
    resume: _Resume = False,
    device: WorkDevice = None,
    dtype: _Dtype = None,
    as_json: AsJson = False,
    offline: Offline = False,
    download: Download = False,
) -> None:
    """Train a student on what its teacher finds likely, and tell what it gained.

    It repairs a pruned model, or makes a draft whose tokens are kept more often. Several GPUs:
    torchrun --nproc-per-node 8 --no-python sailfish distill ... distillation.html beside the weights is the
    report.
    """
    from sailfish.compress.device import find_device
    from sailfish.compress.distill.make import Request
    from sailfish.compress.distill.make import distill as train
    from sailfish.compress.distill.train import Schedule

    on, hardware = find_device(device, dtype, environment())
    source = opening.locate(teacher, offline=offline, download=download)
    request = Request(
        teacher=source,
        student=opening.locate(student, offline=offline, download=download),
        schedule=Schedule(
            steps=steps,
            batch=batch,
            length=length,
            lr=lr,
            divergence=divergence.value,
            alpha=alpha,
            temperature=temperature,
            seed=seed,
            keep_zeros=keep_zeros is Zeros.auto,
        ),
        text=data,
        evaluation=evaluation,
        n_evaluation=eval_windows,
        n_sampled=-(-sampled_from_teacher // length),
        write=partial(_written, source, EngineConfig(device=device)),
        on=on,
        device_name=hardware.name,
        save_every=save_every,
        resume=resume,
    )
    with opening.progress(as_bytes=False) as tell:
        report = train(request, out, tell)
    if report is None:  # another process of torchrun tells
        return
    if as_json:
        tables.show_json(report)
        return
    _show(report)
    typer.echo(f"wrote {out}; its report: {out / 'distillation.html'}")


def _written(
    teacher: Path, config: EngineConfig, prompts: Sequence[Sequence[int]], n_tokens: int, seed: int
) -> list[list[int]]:
    """Return what the teacher writes on prompts, so many tokens each: drawn as it finds them likely.

    Each has a seed of its own, from `seed` on, so that a prompt that comes again goes on otherwise.
    """
    params = [
        SamplingParams(
            max_tokens=n_tokens,
            temperature=1.0,
            top_k=_ALL,
            top_p=1.0,
            min_p=0.0,
            repetition_penalty=1.0,
            seed=seed + n,
            ignore_eos=True,
        )
        for n in range(len(prompts))
    ]
    with Engine(find_or_build(teacher, config), config=config) as engine:
        return [list(answers[0].token_ids) for answers in engine.generate_many(prompts, params)]


def _show(report: Report) -> None:
    from sailfish.compress.distill.page import table_rows

    columns = ("figure", "before", "after", "change")
    tables.show(
        f"{report.student}, taught by {report.teacher} on {report.device} for "
        f"{format_duration(report.seconds)}: {report.n_held_windows} windows of {report.held_out}",
        columns,
        table_rows(report),
        right=columns[1:],
    )
    for warning in report.warnings:
        opening.say(f"warning: {warning}")
