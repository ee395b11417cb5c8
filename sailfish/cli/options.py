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

_MODEL_HELP = "A checkpoint or engine directory, a Hugging Face id org/name, or books-4m (packaged)."
_TARGET_HELP = "cpu, sm_90 and the like, or a card such as h200; need not be here. Default: this machine."
_DOWNLOAD_HELP = "Fetch a Hugging Face model that is not in the cache; else nothing is downloaded."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
Target = Annotated[str | None, typer.Option("--target", metavar="NAME", help=_TARGET_HELP)]
Offline = Annotated[bool, typer.Option("--offline", help="Never download.")]
Download = Annotated[bool, typer.Option("--download", help=_DOWNLOAD_HELP)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
WorkDevice = Annotated[
    str | None,
    typer.Option("--device", metavar="cpu|cuda", help="Where it is done. Default: cuda when there is a GPU."),
]
_ORIGINS = """A setting without its flag is taken from SAILFISH_* (SAILFISH_CONTEXT_TOKENS for --ctx), then
from --config, and is else chosen for model and device: `sailfish explain MODEL` shows each one and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A field of a configuration and the flag that sets it."""

    field: str
    flag: str
    """One spelling; "--x/--no-x" for a switch."""
    help: str
    metavar: str | None = None
    """What stands for the value in the help."""
    kind: Any = str
    """What the terminal's text becomes: text for configurations, which parse every source alike."""


ENGINE = (
    Setting(
        field="device",
        flag="--device",
        metavar="cpu|cuda",
        help="Where the model runs. Default: cuda when there is a GPU.",
    ),
    Setting(
        field="dtype",
        flag="--dtype",
        metavar="float32|bfloat16",
        help="Number format of activations, and of weights not quantised.",
    ),
    Setting(
        field="weights",
        flag="--weights",
        metavar="FORMAT",
        help="Attention and MLP weights in int4, int8 or fp8. Default: as --dtype.",
    ),
    Setting(
        field="weight_group",
        flag="--weight-group",
        metavar="N",
        help="Inputs that share a scale in int4 weights: 32, 64 or 128. Default: 128.",
    ),
    Setting(
        field="head",
        flag="--head",
        metavar="FORMAT",
        help="Output projection in int4, int8 or fp8. Default: as --dtype.",
    ),
    Setting(
        field="embedding",
        flag="--embedding",
        metavar="FORMAT",
        help="Token embedding in int8. Default: as --dtype.",
    ),
    Setting(
        field="context_tokens", flag="--ctx", metavar="TOKENS", help="Longest prompt plus answer, e.g. 8k."
    ),
    Setting(
        field="max_sequences",
        flag="--concurrency",
        metavar="N",
        help="Sequences that run at once; more wait.",
    ),
    Setting(
        field="step_tokens",
        flag="--step-tokens",
        metavar="TOKENS",
        help="Tokens that one step computes at most.",
    ),
    Setting(
        field="mixed_tokens",
        flag="--mixed-tokens",
        metavar="TOKENS",
        help="The same while answers are written, which wait for it.",
    ),
    Setting(
        field="max_queue",
        flag="--max-queue",
        metavar="N",
        help="Requests that may wait before new ones are refused.",
    ),
    Setting(
        field="memory_bytes",
        flag="--memory",
        metavar="BYTES",
        help="Upper bound on device memory, e.g. 20GiB.",
    ),
    Setting(
        field="kv_bytes", flag="--kv-memory", metavar="BYTES", help="Memory for the KV cache, e.g. 4GiB."
    ),
    Setting(
        field="page_tokens",
        flag="--page-tokens",
        metavar="TOKENS",
        help="Tokens in one block of the KV cache.",
    ),
    Setting(
        field="kv_dtype",
        flag="--kv-dtype",
        metavar="DTYPE",
        help="KV cache in int8 or fp8, for twice the context. Default: as --dtype.",
    ),
    Setting(
        field="prefix_cache",
        flag="--prefix-cache/--no-prefix-cache",
        help="Compute equal prompt beginnings once. Default: on.",
    ),
    Setting(
        field="cuda_graphs",
        flag="--cuda-graphs/--no-cuda-graphs",
        help="Launch each decode step at once. Default: on.",
    ),
    Setting(
        field="lag", flag="--lag", metavar="0|1", help="Steps planned before the last one's tokens are known."
    ),
    Setting(
        field="strict", flag="--strict/--no-strict", help="Fail rather than fall back to less. Default: off."
    ),
)
SERVE = (
    Setting(
        field="host",
        flag="--host",
        metavar="ADDRESS",
        help="Address to bind. Default: 127.0.0.1, this machine only.",
    ),
    Setting(field="port", flag="--port", metavar="PORT", help="TCP port; 0 takes a free one. Default: 8000."),
    Setting(
        field="served_model_name",
        flag="--served-model-name",
        metavar="NAME",
        help="What requests call the model. Default: its directory's name.",
    ),
    Setting(
        field="api_keys",
        flag="--api-key",
        metavar="KEYS",
        help="Accepted keys, comma-separated; a file is safer.",
    ),
    Setting(
        field="api_keys_file",
        flag="--api-keys-file",
        metavar="FILE",
        help="File with one key, or name:key, a line.",
    ),
    Setting(
        field="api_processes",
        flag="--api-processes",
        metavar="N",
        help="Processes that speak HTTP. Default: 1.",
    ),
    Setting(
        field="drain_s",
        flag="--drain",
        metavar="TIME",
        help="What running requests get to end after SIGTERM. Default: 30s.",
    ),
    Setting(
        field="cors_origins",
        flag="--cors-origins",
        metavar="ORIGINS",
        help="Web pages that may ask, comma-separated. Default: none.",
    ),
    Setting(
        field="vllm_metrics",
        flag="--vllm-metrics/--no-vllm-metrics",
        help="Export vLLM's metric names too. Default: on.",
    ),
)
SAMPLING = (
    Setting(
        field="max_tokens",
        flag="--max-tokens",
        metavar="N",
        kind=int,
        help="Tokens to generate at most. Default: until the context is full.",
    ),
    Setting(
        field="min_tokens",
        flag="--min-tokens",
        metavar="N",
        kind=int,
        help="Tokens to generate before the text may end.",
    ),
    Setting(
        field="temperature",
        flag="--temperature",
        metavar="T",
        kind=float,
        help="0 takes the likeliest token, 2 is wildest. Default: the model's, else 1.",
    ),
    Setting(field="top_k", flag="--top-k", metavar="N", kind=int, help="Draw among the N likeliest tokens."),
    Setting(
        field="top_p",
        flag="--top-p",
        metavar="P",
        kind=float,
        help="Draw among the likeliest tokens that have P of all probability.",
    ),
    Setting(
        field="min_p",
        flag="--min-p",
        metavar="P",
        kind=float,
        help="Drop tokens that are less than P times as likely as the likeliest.",
    ),
    Setting(
        field="repetition_penalty",
        flag="--repetition-penalty",
        metavar="X",
        kind=float,
        help="Above 1, tokens that came before are less likely.",
    ),
    Setting(
        field="seed",
        flag="--seed",
        metavar="N",
        kind=int,
        help="Draw the same tokens whenever N is the same.",
    ),
    Setting(
        field="stop",
        flag="--stop",
        metavar="TEXT",
        kind=list[str],
        help="End the answer before this text; may be repeated.",
    ),
    Setting(field="n", flag="--n", metavar="N", kind=int, help="Answers to each prompt. Default: 1."),
    Setting(
        field="ignore_eos",
        flag="--ignore-eos/--heed-eos",
        help="Go on past the end of the text. Default: heed it.",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a command was asked for, and where each value came from."""

    engine: EngineConfig
    serve: ServeConfig
    sampling: SamplingParams
    origins: dict[str, str]


def with_settings(*tables: tuple[Setting, ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of these tables, `--config` with them, and a parameter `settings`.

    Its help says in the end where settings come from.
    """
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
        run.__doc__ = f"{inspect.getdoc(command)}\n\n{_ORIGINS}"
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
    annotation = Annotated[
        kind | None, typer.Option(row.flag, metavar=row.metavar, help=row.help, show_default=False)
    ]
    return inspect.Parameter(row.field, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="FILE", help="TOML file with tables [engine] and [serve].", show_default=False
        ),
    ],
)
