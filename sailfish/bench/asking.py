"""Asks an engine for tokens and notes when they came."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sailfish.engine.api import Options, SamplingParams
from sailfish.engine.client import AsyncEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """When the tokens of one request came, by the clock of `time.perf_counter`."""

    asked_s: float
    arrivals: tuple[tuple[float, int], ...]
    """(time, tokens) of each chunk."""

    @property
    def first_s(self) -> float:
        """Return the time from the question to the first token."""
        return self.arrivals[0][0] - self.asked_s

    @property
    def gaps_s(self) -> list[float]:
        """Return the times between one chunk and the next."""
        times = [at_s for at_s, _ in self.arrivals]
        return [b - a for a, b in zip(times, times[1:], strict=False)]

    @property
    def n_tokens(self) -> int:
        """Return how many tokens came."""
        return sum(n for _, n in self.arrivals)


def random_prompt(draw: random.Random, engine: AsyncEngine, n_tokens: int) -> list[int]:
    """Return token ids that no other prompt begins with."""
    return draw.choices(range(engine.info.vocab_size), k=n_tokens)


async def ask(engine: AsyncEngine, prompt_ids: Sequence[int], n_out: int, *, tenant: str = "") -> Answered:
    """Ask for exactly `n_out` greedy tokens."""
    params = SamplingParams(max_tokens=n_out, temperature=0.0, ignore_eos=True)
    asked_s = time.perf_counter()
    arrivals = []
    async for chunk in await engine.submit(prompt_ids, params, Options(tenant=tenant)):
        arrivals.append((time.perf_counter(), len(chunk.token_ids)))
    return Answered(asked_s=asked_s, arrivals=tuple(arrivals))


async def ask_together(
    engine: AsyncEngine, prompts: Sequence[Sequence[int]], n_out: int
) -> tuple[float, list[Answered]]:
    """Ask for all at once; return the seconds until the last token, and the answers."""
    start_s = time.perf_counter()
    answers = await asyncio.gather(*(ask(engine, prompt, n_out) for prompt in prompts))
    return time.perf_counter() - start_s, answers
