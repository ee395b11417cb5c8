"""Measures an engine on a text and on task sets, and puts what was found into figures and evidence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from sailfish.artifact.reader import Artifact
from sailfish.artifact.side import append_evidence
from sailfish.artifact.start import Start
from sailfish.base.config import EngineConfig
from sailfish.base.errors import ConfigError
from sailfish.bench.scoring import EngineModel, HttpModel, Model, Told, score_tasks, score_windows
from sailfish.checkpoint.tokenizer import Tokenizer
from sailfish.engine.client import AsyncEngine
from sailfish.quality.evaluate import compare, score
from sailfish.quality.intervals import Interval
from sailfish.quality.model import WindowModel
from sailfish.quality.scores import Scores
from sailfish.quality.task_scores import TaskScores
from sailfish.quality.tasks import TaskSet
from sailfish.quality.text import read_text
from sailfish.quality.windows import Window, evaluation_windows

Progress = Callable[[str, int, int], None]
"""Told (stage, done, in all)."""
_CHARS_PER_TOKEN = 16
"""More than tokenizers make of plain text: so much is read for the windows that are wanted, at first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextWindows:
    """Windows of a text, and what identifies them."""

    text: str
    """The file's name."""
    sha256: str
    """Of the windows' token ids, as 32-bit words in order."""
    window_tokens: int
    stride_tokens: int
    windows: Sequence[Window]

    @property
    def n_scored(self) -> int:
        """Tokens that count."""
        return sum(window.n_scored for window in self.windows)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskMeasure:
    """What a model scored on a task set."""

    name: str
    kind: str
    n_shots: int
    n_questions: int
    figures: Mapping[str, Interval]


def text_windows(
    path: Path,
    tokenizer: Tokenizer,
    *,
    window_tokens: int,
    stride_tokens: int | None = None,
    n_windows: int | None = None,
) -> TextWindows:
    """Cut the first windows of a text, or all; it is tokenised without special tokens around it.

    Raises ConfigError for a text that is too short or cannot be read.
    """
    stride = window_tokens if stride_tokens is None else stride_tokens
    needed = None if n_windows is None else (window_tokens + (n_windows - 1) * stride) * _CHARS_PER_TOKEN
    text = read_text(path, max_chars=needed)
    ids = tokenizer.encode(text, add_special=False)
    if needed is not None and len(text) == needed and len(ids) * _CHARS_PER_TOKEN < needed:
        ids = tokenizer.encode(read_text(path), add_special=False)
    windows = evaluation_windows(
        ids, window_tokens=window_tokens, stride_tokens=stride_tokens, n_windows=n_windows
    )
    state = hashlib.sha256()
    for window in windows:
        state.update(np.array(window.tokens, "<i4").tobytes())
    return TextWindows(
        text=path.name,
        sha256=state.hexdigest(),
        window_tokens=window_tokens,
        stride_tokens=stride,
        windows=windows,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """An engine that reads windows in this process: its weights, kernels and cache as they would start."""

    engine: Artifact
    start: Start

    def open(self, window_tokens: int) -> WindowModel:
        """Load it."""
        return WindowModel.of_engine(self.engine, start=self.start, window_tokens=window_tokens)


def measure_text(
    reader: Reader, parent: Reader | None, text: TextWindows, progress: Progress
) -> dict[str, Interval]:
    """Return an engine's perplexity and, with a parent, how far it is from that.

    Each window is read from an empty cache. Raises as `quality.evaluate.compare` does.
    """
    model = reader.open(text.window_tokens)

    def told(done: int, total: int) -> None:
        progress("text", done, total)

    if parent is None:
        return {"perplexity": score(model, text.windows, told).perplexity()}
    found = compare(model, parent.open(text.window_tokens), text.windows, told).summary()
    names = ("perplexity", "parent_perplexity", "increase", "kl", "kl_p99", "kl_p999", "top1", "acceptance")
    return {name: getattr(found, name) for name in names}


async def measure_text_by_http(model: HttpModel, text: TextWindows, told: Told) -> dict[str, Interval]:
    """Return a server's perplexity; its windows do not overlap, for it scores every token it is sent.

    Raises ConfigError for overlapping windows and EngineError where the server does not answer.
    """
    if text.stride_tokens != text.window_tokens:
        raise ConfigError(
            "windows that overlap are not measured through HTTP", hint="leave --stride out", param="stride"
        )
    found = await score_windows(model, [window.tokens for window in text.windows], told)
    nll = [np.array(window, np.float64) for window in found]
    return {"perplexity": Scores(nll=nll).perplexity()}


async def measure_tasks(
    model: Model, tokenizer: Tokenizer, sets: Sequence[TaskSet], rows: TextIO | None, progress: Progress
) -> list[TaskMeasure]:
    """Return the figures of each task set; write every question's scores to `rows` as JSON lines."""
    measured = []
    for tasks in sets:

        def told(done: int, total: int, name: str = tasks.name) -> None:
            progress(name, done, total)

        scores = await score_tasks(model, tokenizer, tasks, told)
        if rows is not None:
            _write_rows(rows, tasks, scores)
        measured.append(
            TaskMeasure(
                name=tasks.name,
                kind=tasks.kind,
                n_shots=tasks.n_shots,
                n_questions=len(tasks.questions),
                figures=scores.summary(),
            )
        )
    return measured


async def measure_tasks_of_engine(
    engine_dir: Path, config: EngineConfig, sets: Sequence[TaskSet], rows: TextIO | None, progress: Progress
) -> list[TaskMeasure]:
    """Start an engine process, measure the task sets through it, and end it."""
    async with await AsyncEngine.start(engine_dir, config=config) as engine:
        return await measure_tasks(EngineModel(engine), engine.tokenizer, sets, rows, progress)


def remember_text(
    reader: Reader, parent: Reader | None, text: TextWindows, figures: Mapping[str, Interval]
) -> None:
    """Append what was measured on a text to an engine's evidence."""
    values: dict[str, float | str] = {
        "text": text.text,
        "tokens_sha256": text.sha256,
        "window_tokens": float(text.window_tokens),
        "stride_tokens": float(text.stride_tokens),
        "windows": float(len(text.windows)),
    }
    plan = reader.start.plan
    values |= {"dtype": plan.dtype, "kv_dtype": plan.kv_dtype}
    values |= {} if parent is None else {"parent": parent.engine.digest}
    _remember(reader.engine, "quality", values, figures)


def remember_tasks(engine: Artifact, measured: Sequence[TaskMeasure]) -> None:
    """Append what was measured on task sets to an engine's evidence, one line each."""
    for task in measured:
        values: dict[str, float | str] = {"task": task.name, "kind": task.kind}
        values |= {"shots": float(task.n_shots), "questions": float(task.n_questions)}
        _remember(engine, f"task {task.name}", values, task.figures)


def _remember(
    engine: Artifact, kind: str, values: Mapping[str, float | str], figures: Mapping[str, Interval]
) -> None:
    found = dict(values)
    for name, interval in figures.items():
        found |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    append_evidence(engine, kind, found, device=engine.manifest.target)


def _write_rows(rows: TextIO, tasks: TaskSet, scores: TaskScores) -> None:
    for number, (row, given) in enumerate(zip(scores.rows, scores.given, strict=True), tasks.n_shots):
        found = {"written": given} if isinstance(given, str) else {"logprobs": [one.logprob for one in given]}
        rows.write(json.dumps({"task": tasks.name, "row": number, **row, **found}) + "\n")
