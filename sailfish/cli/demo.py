"""`sailfish demo`: the packaged model, from checkpoint to streamed answer, with the figures."""

from __future__ import annotations

import typer

from sailfish.artifact.reader import Artifact
from sailfish.base import units
from sailfish.base.config import EngineConfig, ServeConfig
from sailfish.bench import demo as measured
from sailfish.cli import opening, tables
from sailfish.cli.options import Settings
from sailfish.data import DEMO_MODEL_NAME
from sailfish.engine.api import SamplingParams


def demo() -> None:
    """Build (or find) books-4m, serve it, stream an answer through the openai client, and end cleanly."""
    settings = Settings(engine=EngineConfig(), serve=ServeConfig(), sampling=SamplingParams(), origins={})
    engine_dir = opening.find(DEMO_MODEL_NAME, settings)
    opening.say("serving it with `sailfish serve`, asking with the openai client:\n")
    figures = measured.run(engine_dir, lambda text: typer.echo(text, nl=False))
    plan = opening.start_of(Artifact.open(engine_dir), settings.engine).plan
    kv_tokens = plan.n_blocks * plan.page_tokens
    rows = (
        ("weights", units.format_bytes(plan.memory_bytes("weights"))),
        ("KV blocks", f"{units.format_bytes(plan.memory_bytes('kv_blocks'))} ({kv_tokens} tokens)"),
        ("process start to READY", units.format_duration(figures.ready_s)),
        ("time to first token", f"{figures.ttft_ms:.1f} ms"),
        ("tokens per second, one stream", f"{figures.tokens_per_s:.0f}"),
        ("per token after 512, from the KV cache", f"{figures.cached_ms:.2f} ms"),
        ("per token after 512, without it", f"{figures.uncached_ms:.2f} ms ({figures.speed_up:.1f} x)"),
        ("server's exit status", str(figures.exit_code)),
    )
    tables.show(
        f"{DEMO_MODEL_NAME} on {plan.device}, {plan.dtype}", ("figure", "value"), rows, right=("value",)
    )
