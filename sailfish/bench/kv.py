"""What the KV cache is worth: one answer drawn with it, and again by computing every prefix anew."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sailfish.engine.api import Options, SamplingParams
from sailfish.engine.client import AsyncEngine

ROW = "KV cache against recomputing"


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRun:
    """One answer of `n_out` tokens to `n_in`, both ways."""

    n_in: int
    n_out: int
    cached_s: float
    recomputed_s: float
    is_same: bool
    """Whether both ways gave the same tokens."""


async def measure_kv(engine: AsyncEngine, *, n_in: int, n_out: int, repeats: int) -> list[KvRun]:
    """Run `repeats` greedy answers both ways, after one that does not count."""
    draw = random.Random(1)
    runs = []
    for i in range(repeats + 1):
        prompt_ids = draw.choices(range(engine.info.vocab_size), k=n_in)
        begin_s = time.perf_counter()
        with_cache = await _answer(engine, prompt_ids, n_out, tenant=f"kv-{i}")
        middle_s = time.perf_counter()
        without: list[int] = []
        for at in range(n_out):  # a tenant of its own for each token, so that no prefix is found
            without += await _answer(engine, prompt_ids + without, 1, tenant=f"kv-{i}-{at}")
        end_s = time.perf_counter()
        runs.append(
            KvRun(
                n_in=n_in,
                n_out=n_out,
                cached_s=middle_s - begin_s,
                recomputed_s=end_s - middle_s,
                is_same=with_cache == without,
            )
        )
    return runs[1:]


def gains(runs: Sequence[KvRun]) -> list[float]:
    """Return how many times faster each run was with the cache."""
    return [run.recomputed_s / run.cached_s for run in runs]


async def _answer(engine: AsyncEngine, prompt_ids: list[int], n_tokens: int, *, tenant: str) -> list[int]:
    params = SamplingParams(max_tokens=n_tokens, temperature=0.0, ignore_eos=True)
    answer = await engine.submit(prompt_ids, params, Options(tenant=tenant))
    return [token async for chunk in answer for token in chunk.token_ids]
