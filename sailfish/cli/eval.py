"""`sailfish eval`: how good a model is, and how near its parent it stays."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from sailfish.artifact.reader import Artifact
from sailfish.base.errors import ArtifactError, ConfigError
from sailfish.checkpoint.tokenizer import Tokenizer
from sailfish.cli import opening, tables
from sailfish.cli.options import ENGINE, AsJson, Download, Model, Offline, Settings, with_settings
from sailfish.plan.formats import words

if TYPE_CHECKING:
    from sailfish.bench.evaluate import Reader, TaskMeasure, TextWindows
    from sailfish.quality.intervals import Interval
    from sailfish.quality.tasks import TaskSet

_WINDOW_TOKENS = 1024
_TASKS_HELP = "A task set: JSON lines as LAMBADA, HellaSwag, ARC or GSM8K have them; may be repeated."


@with_settings(ENGINE)
def eval(
    model: Model,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help='Plain text or JSON lines with "text"; .xz and .gz too.'),
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="PARENT", help="The model it was made from.")
    ] = None,
    window: Annotated[
        int, typer.Option("--window", min=2, metavar="TOKENS", help="Tokens read at a time.")
    ] = _WINDOW_TOKENS,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride", min=1, metavar="TOKENS", help="From one window to the next. Default: --window."
        ),
    ] = None,
    n_windows: Annotated[
        int | None, typer.Option("--windows", min=2, metavar="N", help="Read the first N. Default: all.")
    ] = None,
    tasks: Annotated[list[Path] | None, typer.Option("--tasks", metavar="FILE", help=_TASKS_HELP)] = None,
    shots: Annotated[
        int, typer.Option("--shots", min=0, metavar="N", help="A task set's first N rows are examples.")
    ] = 0,
    limit: Annotated[
        int | None, typer.Option("--limit", min=2, metavar="N", help="Ask N questions of each task set.")
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option("--rows", metavar="FILE", help="Write each question's scores as JSON lines."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help="Ask this server; MODEL then gives the tokenizer only."),
    ] = None,
    served: Annotated[
        str | None,
        typer.Option("--served", metavar="NAME", help="Of the server's models. Default: the first."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", metavar="KEY", help="What the server wants to see.")
    ] = None,
    as_json: AsJson = False,
    offline: Offline = False,
    download: Download = False,
    *,
    settings: Settings,
) -> None:
    """Measure perplexity on a text, the distance to a parent, and scores on task sets.

    Text is cut into windows, each read from an empty cache; a shorter stride scores only what is new in a
    window. Intervals hold the true figure with 95% confidence over the choice of windows or questions. What
    is found is appended to the engine's evidence, which `sailfish inspect` shows.
    """
    if text is None and not tasks:
        raise ConfigError("there is nothing to measure", hint="give --text FILE, --tasks FILE, or both")
    if against is not None and (text is None or url is not None):
        raise ConfigError("--against compares on a text, in this process", hint="give --text, and no --url")
    _refuse_idle(tasks, (rows, shots or None, limit), url, (served, api_key), settings.origins)
    asked = _Asked(
        text=text,
        window=window,
        stride=stride,
        n_windows=n_windows,
        sets=_task_sets(tasks or [], shots, limit),
    )
    source = opening.locate(model, offline=offline, download=download)
    with _open_rows(rows) as out:
        if url is not None:
            found = _of_server(asked, source, url, api_key, served, out)
        else:
            parent = None
            if against is not None:
                parent = _parent(opening.locate(against, offline=offline, download=download), settings)
            found = _of_engine(asked, _reader(source, settings), parent, settings, out)
    if as_json:
        tables.show_json(found)
    else:
        _show(found)


def _refuse_idle(
    tasks: Sequence[Path] | None,
    of_tasks: Sequence[object],
    url: str | None,
    of_server: Sequence[object],
    origins: Mapping[str, str],
) -> None:
    """Refuse flags that would mean nothing."""
    if not tasks and any(value is not None for value in of_tasks):
        raise ConfigError("--rows, --shots and --limit are of task sets", hint="give --tasks FILE")
    if url is None and any(value is not None for value in of_server):
        raise ConfigError("--served and --api-key are of a server", hint="give --url URL")
    given = [setting.flag for setting in ENGINE if origins[setting.field].startswith("--")]
    if url is not None and given:
        raise ConfigError(
            f"{', '.join(given)} would not reach the server at --url", hint="start the server with it"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What to measure."""

    text: Path | None
    window: int
    stride: int | None
    n_windows: int | None
    sets: Sequence[TaskSet]

    def windows(self, directory: Path) -> TextWindows | None:
        """Cut the text with a directory's tokenizer."""
        from sailfish.bench.evaluate import text_windows

        if self.text is None:
            return None
        return text_windows(
            self.text,
            Tokenizer.load(directory),
            window_tokens=self.window,
            stride_tokens=self.stride,
            n_windows=self.n_windows,
        )


def _of_engine(
    asked: _Asked, reader: Reader, parent: Reader | None, settings: Settings, rows: TextIO | None
) -> dict[str, Any]:
    """Measure an engine and remember what was found, where its directory can be written."""
    from sailfish.bench import evaluate

    engine, plan = reader.engine, reader.start.plan
    found: dict[str, Any] = {"model": engine.manifest.name, "engine": engine.digest}
    found |= {"weights": words(plan.formats), "dtype": plan.dtype, "kv_dtype": plan.kv_dtype}
    remembered: list[Callable[[], None]] = []
    if (windows := asked.windows(engine.directory)) is not None:
        with opening.progress(as_bytes=False) as tell:
            figures = evaluate.measure_text(reader, parent, windows, tell)
        found |= _told_text(windows, figures)
        found |= {} if parent is None else {"parent": parent.engine.digest}
        remembered.append(functools.partial(evaluate.remember_text, reader, parent, windows, figures))
    if asked.sets:
        with opening.progress(as_bytes=False) as tell:
            measured = asyncio.run(
                evaluate.measure_tasks_of_engine(engine.directory, settings.engine, asked.sets, rows, tell)
            )
        found["tasks"] = [_told_task(task) for task in measured]
        remembered.append(functools.partial(evaluate.remember_tasks, engine, measured))
    try:
        for remember in remembered:
            remember()
    except ArtifactError as error:  # a read-only engine can be measured as well
        opening.say(f"warning: not kept as evidence: {error}")
    return found


def _of_server(
    asked: _Asked, source: Path, url: str, api_key: str | None, served: str | None, rows: TextIO | None
) -> dict[str, Any]:
    """Measure what a server serves."""
    from sailfish.bench import evaluate
    from sailfish.bench.scoring import HttpModel

    async def ask() -> dict[str, Any]:
        with contextlib.closing(HttpModel(url, api_key=api_key, name=served)) as model:
            found: dict[str, Any] = {"model": model.name, "url": url}
            with opening.progress(as_bytes=False) as tell:
                if (windows := asked.windows(source)) is not None:
                    told = functools.partial(tell, "text")
                    found |= _told_text(windows, await evaluate.measure_text_by_http(model, windows, told))
                if asked.sets:
                    tokenizer = Tokenizer.load(source)
                    measured = await evaluate.measure_tasks(model, tokenizer, asked.sets, rows, tell)
                    found["tasks"] = [_told_task(task) for task in measured]
            return found

    return asyncio.run(ask())


def _reader(source: Path, settings: Settings) -> Reader:
    from sailfish.bench.evaluate import Reader

    engine = Artifact.open(opening.find(str(source), settings))
    return Reader(engine=engine, start=opening.start_of(engine, settings.engine))


def _parent(source: Path, settings: Settings) -> Reader:
    """Open the parent with the device and dtype that are asked for, its weights and cache as they are."""
    engine = replace(
        settings.engine, weights=None, weight_group=None, head=None, embedding=None, kv_dtype=None
    )
    return _reader(source, replace(settings, engine=engine))


def _task_sets(paths: Sequence[Path], shots: int, limit: int | None) -> list[TaskSet]:
    from sailfish.quality.tasks import read_tasks

    return [read_tasks(path, n_shots=shots, limit=limit) for path in paths]


@contextlib.contextmanager
def _open_rows(path: Path | None) -> Iterator[TextIO | None]:
    if path is None:
        yield None
        return
    try:
        stream = path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", param="rows") from None
    with stream:
        yield stream


def _told_text(windows: TextWindows, figures: Mapping[str, Interval]) -> dict[str, Any]:
    return {
        "text": {
            "file": windows.text,
            "tokens_sha256": windows.sha256,
            "window_tokens": windows.window_tokens,
            "stride_tokens": windows.stride_tokens,
            "windows": len(windows.windows),
            "scored_tokens": windows.n_scored,
            "figures": dict(figures),
        }
    }


def _told_task(task: TaskMeasure) -> dict[str, Any]:
    return {
        "name": task.name,
        "kind": task.kind,
        "shots": task.n_shots,
        "questions": task.n_questions,
        "figures": dict(task.figures),
    }


def _show(found: Mapping[str, Any]) -> None:
    if "text" in found:
        text = found["text"]
        title = (
            f"{found['model']} on {text['file']}: {text['windows']:,} windows of {text['window_tokens']:,}, "
            f"stride {text['stride_tokens']:,}, {text['scored_tokens']:,} tokens scored"
        )
        _show_figures(title, text["figures"])
    for task in found.get("tasks", ()):
        examples = f", {task['shots']} examples" if task["shots"] else ""
        title = (
            f"{found['model']} on {task['name']} ({task['kind']}): {task['questions']:,} questions{examples}"
        )
        _show_figures(title, task["figures"])


def _show_figures(title: str, figures: Mapping[str, Interval]) -> None:
    rows = [
        (name, _figure(name, figure.value), f"{_figure(name, figure.low)} to {_figure(name, figure.high)}")
        for name, figure in figures.items()
    ]
    tables.show(title, ("figure", "value", "95% interval"), rows, right=("value", "95% interval"))


def _figure(name: str, value: float) -> str:
    if "perplexity" in name:
        return f"{value:.4f}"
    return f"{value:.5f}" if name.startswith("kl") else f"{value:.2%}"
