"""The demo: the packaged model built, served by a real process, and asked through the openai client."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sailfish.base.errors import ConfigError, EngineError
from sailfish.bench.server import ServerProcess

if TYPE_CHECKING:
    from openai import OpenAI

PROMPT = "It was a dark and stormy night, and the old house"
ANSWER_TOKENS = 96
_COMPARED_TOKENS = 32
_COMPARED_PROMPT_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What the demo measured, all through HTTP."""

    ready_s: float
    ttft_ms: float
    tokens_per_s: float
    cached_ms: float
    """Per token after a long prompt, decoding from the KV cache."""
    uncached_ms: float
    """Per token after the same prompt, all positions computed again for each token."""
    exit_code: int

    @property
    def speed_up(self) -> float:
        """What the KV cache gains."""
        return self.uncached_ms / self.cached_ms


def run(engine_dir: Path, write: Callable[[str], None]) -> Figures:
    """Serve an engine, stream one answer into `write`, and measure; raises when any part fails."""
    try:
        from openai import OpenAI
    except ImportError as error:
        raise ConfigError(
            "the demo needs the openai client", hint="pip install 'sailfish[client]'"
        ) from error
    start_s = time.perf_counter()
    with ServerProcess(engine_dir) as server:
        ready_s = time.perf_counter() - start_s
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            model = client.models.list().data[0].id
            ttft_s, tokens_per_s = _stream(client, model, write)
            cached_s, uncached_s = _compare(client, model)
        exit_code = server.stop()
    if exit_code != 0:
        raise EngineError(f"the server ended with status {exit_code}")
    return Figures(
        ready_s=ready_s,
        ttft_ms=ttft_s * 1e3,
        tokens_per_s=tokens_per_s,
        cached_ms=cached_s * 1e3,
        uncached_ms=uncached_s * 1e3,
        exit_code=exit_code,
    )


def _stream(client: OpenAI, model: str, write: Callable[[str], None]) -> tuple[float, float]:
    """Stream the answer; return (seconds to the first token, tokens per second after it)."""
    write(PROMPT)
    start_s = time.perf_counter()
    first_s = 0.0
    n_tokens = 0
    for chunk in client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=ANSWER_TOKENS,
        temperature=0.8,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    ):
        if chunk.choices:
            first_s = first_s or time.perf_counter()
            write(chunk.choices[0].text)
        if chunk.usage is not None:
            n_tokens = chunk.usage.completion_tokens
    write("\n")
    return first_s - start_s, (n_tokens - 1) / (time.perf_counter() - first_s)


def _compare(client: OpenAI, model: str) -> tuple[float, float]:
    """Return seconds per token with the KV cache and, by asking for one token at a time, without.

    A salt of its own keeps every single-token request from reusing what an earlier one left.
    """
    prompt = [(7 * i) % 1000 + 100 for i in range(_COMPARED_PROMPT_TOKENS)]

    def seconds(n_tokens: int, salt: str) -> float:
        start_s = time.perf_counter()
        client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=n_tokens,
            temperature=0.0,
            extra_body={"ignore_eos": True, "cache_salt": salt},
        )
        return time.perf_counter() - start_s

    single_s = statistics.median(seconds(1, f"single {i}") for i in range(8))
    many_s = statistics.median(seconds(_COMPARED_TOKENS + 1, f"many {i}") for i in range(3))
    return (many_s - single_s) / _COMPARED_TOKENS, single_s
