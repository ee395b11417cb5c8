"""The flags of every setting, one table each, and how they become configurations."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sailfish.base import sources
from sailfish.base.config import EngineConfig, ServeConfig
from sailfish.engine.api import SamplingParams

MODEL_HELP = "An engine or checkpoint directory, a hub id, or books-4m (packaged)."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Offline = Annotated[bool, typer.Option("--offline", help="Never download; use what the cache holds.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch a hub model that the cache lacks.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A field of a configuration and the flag that sets it."""

    field: str
    flag: str
    """One spelling; "--x/--no-x" for a switch."""
    help: str
    kind: Any = str
    """What the terminal's text becomes: text for configurations, which parse every source alike."""


ENGINE = (
    Setting(field="device", flag="--device", help="cpu or cuda. Default: cuda when there is one."),
    Setting(field="dtype", flag="--dtype", help="float32 or bfloat16."),
    Setting(field="context_tokens", flag="--ctx", help="Longest prompt plus answer, e.g. 8k."),
    Setting(field="max_sequences", flag="--concurrency", help="Sequences that run at once."),
    Setting(field="step_tokens", flag="--step-tokens", help="Token budget of one step."),
    Setting(
        field="max_queue", flag="--max-queue", help="Requests that may wait before new ones are refused."
    ),
    Setting(field="memory_bytes", flag="--memory", help="Upper bound on device memory, e.g. 20GiB."),
    Setting(field="kv_bytes", flag="--kv-memory", help="Memory for KV blocks, e.g. 4GiB."),
    Setting(field="page_tokens", flag="--page-tokens", help="Tokens per KV block."),
    Setting(
        field="prefix_cache", flag="--prefix-cache/--no-prefix-cache", help="Reuse equal prompt beginnings."
    ),
    Setting(field="lag", flag="--lag", help="Steps planned ahead of known tokens: 0 or 1."),
    Setting(field="strict", flag="--strict/--no-strict", help="Make every fallback an error."),
)
SERVE = (
    Setting(field="host", flag="--host", help="Address to bind. Default: 127.0.0.1."),
    Setting(field="port", flag="--port", help="TCP port; 0 takes a free one. Default: 8000."),
    Setting(field="served_model_name", flag="--served-model-name", help="Name that requests use."),
    Setting(field="api_keys", flag="--api-key", help="Accepted keys, comma-separated; a file is safer."),
    Setting(field="api_keys_file", flag="--api-keys-file", help="File with one name:key a line."),
    Setting(field="api_processes", flag="--api-processes", help="Processes that speak HTTP."),
    Setting(field="drain_s", flag="--drain", help="Time running requests may take after SIGTERM, e.g. 30s."),
    Setting(field="cors_origins", flag="--cors-origins", help="Allowed origins, comma-separated."),
    Setting(
        field="vllm_metrics", flag="--vllm-metrics/--no-vllm-metrics", help="Export vLLM's metric names too."
    ),
)
SAMPLING = (
    Setting(field="max_tokens", flag="--max-tokens", kind=int, help="Tokens to generate at most."),
    Setting(field="min_tokens", flag="--min-tokens", kind=int, help="Tokens before the text may end."),
    Setting(field="temperature", flag="--temperature", kind=float, help="0 takes the likeliest token."),
    Setting(field="top_k", flag="--top-k", kind=int, help="Draw among the k likeliest tokens."),
    Setting(field="top_p", flag="--top-p", kind=float, help="Draw among the likeliest tokens of this mass."),
    Setting(field="min_p", flag="--min-p", kind=float, help="Drop tokens below this share of the likeliest."),
    Setting(field="repetition_penalty", flag="--repetition-penalty", kind=float, help="1 is neutral."),
    Setting(field="seed", flag="--seed", kind=int, help="Draw the same tokens again."),
    Setting(field="stop", flag="--stop", kind=list[str], help="End the text here; may be repeated."),
    Setting(field="n", flag="--n", kind=int, help="Answers to each prompt."),
    Setting(field="ignore_eos", flag="--ignore-eos/--heed-eos", help="Go on past the end of the text."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a command was asked for, and where each value came from."""

    engine: EngineConfig
    serve: ServeConfig
    sampling: SamplingParams
    origins: dict[str, str]


def with_settings(*tables: tuple[Setting, ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of these tables, `--config` with them, and a parameter `settings`."""
    rows = [setting for table in tables for setting in table]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        kept = [parameter for name, parameter in own.items() if name != "settings"]
        parameters = kept + [_parameter(row) for row in rows] + [_CONFIG]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            file = values.pop("config")
            given = {row.field: values.pop(row.field) for row in rows}
            command(**values, settings=_load(file, given))

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _load(file: Path | None, given: dict[str, Any]) -> Settings:
    environ = sources.environment()
    engine, of_engine = sources.load(EngineConfig, file=file, environ=environ, flags=_flags(ENGINE, given))
    serve, of_serve = sources.load(ServeConfig, file=file, environ=environ, flags=_flags(SERVE, given))
    sampling = {row.field: given[row.field] for row in SAMPLING if given.get(row.field) is not None}
    if "stop" in sampling:
        sampling["stop"] = tuple(sampling["stop"])
    return Settings(
        engine=engine, serve=serve, sampling=SamplingParams(**sampling), origins=of_engine | of_serve
    )


def _flags(rows: tuple[Setting, ...], given: dict[str, Any]) -> dict[str, sources.Flag]:
    return {
        row.field: sources.Flag(spelling=row.flag, value=given[row.field])
        for row in rows
        if row.field in given
    }


def _parameter(row: Setting) -> inspect.Parameter:
    kind: Any = bool if "/" in row.flag else row.kind
    annotation = Annotated[kind | None, typer.Option(row.flag, help=row.help, show_default=False)]
    return inspect.Parameter(row.field, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None, typer.Option("--config", help="TOML file with [engine] and [serve].", show_default=False)
    ],
)
