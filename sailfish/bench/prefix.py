"""What equal prompt beginnings gain: many requests that share a cached part of their prompt, or one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sailfish.bench.asking import ask, ask_together, random_prompt
from sailfish.engine.client import AsyncEngine

SHARES = (0, 50, 90)
"""Percent of the prompt that is common and cached."""
PROMPT_TOKENS, OUTPUT_TOKENS, REQUESTS = 2248, 16, 256
_LONE_RUNS = 5
_WARM_REQUESTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What one share gave, one figure for each run."""

    share: int
    n_requests: int
    requests_per_s: tuple[float, ...]
    lone_ms: tuple[float, ...]
    """Time to first token of a request that is alone."""

    def figures(self) -> Iterator[tuple[str, Sequence[float], str]]:
        """Yield (row, values, unit)."""
        yield row_of(self.share, self.n_requests, "requests"), self.requests_per_s, "1/s"
        yield row_of(self.share, self.n_requests, "lone ttft"), self.lone_ms, "ms"


def row_of(share: int, n_requests: int, what: str) -> str:
    """Return a row's name; the number of requests is named where it is not the usual one."""
    return f"prefix {share} %{'' if n_requests == REQUESTS else f' ({n_requests} requests)'}: {what}"


async def measure_share(engine: AsyncEngine, share: int, *, repeats: int) -> Shared:
    """Measure requests at once whose prompts of 2,248 tokens have `share` percent in common.

    There are 256 of them, or as many as run together if that is less.
    """
    n_requests = min(REQUESTS, engine.info.max_sequences)
    draw = random.Random(share)
    n_prompt = min(PROMPT_TOKENS, engine.info.context_tokens - OUTPUT_TOKENS)
    n_common = n_prompt * share // 100
    rates, lone_ms = [], []
    for _ in range(repeats):
        common = random_prompt(draw, engine, n_common)

        def prompt(common: list[int] = common) -> list[int]:
            return common + random_prompt(draw, engine, n_prompt - n_common)

        await ask(engine, prompt(), 1)  # leaves the common part in the cache
        await ask_together(engine, [prompt() for _ in range(_WARM_REQUESTS)], 2)
        total_s, _ = await ask_together(engine, [prompt() for _ in range(n_requests)], OUTPUT_TOKENS)
        rates.append(n_requests / total_s)
        for _ in range(_LONE_RUNS):
            lone_ms.append((await ask(engine, prompt(), 1)).first_s * 1e3)
    return Shared(share=share, n_requests=n_requests, requests_per_s=tuple(rates), lone_ms=tuple(lone_ms))
