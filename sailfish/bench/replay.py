"""Replays a trace of real requests: their lengths in order, arrivals by chance at a given rate."""

from __future__ import annotations

import asyncio
import csv
import io
import lzma
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sailfish.base.errors import ConfigError
from sailfish.bench.asking import Answered, ask, random_prompt
from sailfish.engine.client import AsyncEngine

RATES = {8: 200, 16: 400, 24: 600}
"""Requests a second, and how many are sent at each."""
_MAX_IN, _MAX_OUT = 4096, 800
_COLUMNS = ("ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What one rate gave."""

    rate: int
    output_per_s: float
    first_ms: tuple[float, ...]
    """From the moment a request was due to its first token, of each request."""
    gap_ms: tuple[float, ...]
    """Between the chunks of an answer, of all answers."""
    token_ms: tuple[float, ...]
    """Mean time between the tokens of an answer, of each answer longer than one token."""

    def figures(self) -> Iterator[tuple[str, float, str]]:
        """Yield (name, value, unit)."""
        yield "output", self.output_per_s, "tokens/s"
        for name, values, shares in (
            ("ttft", self.first_ms, (50, 90, 99)),
            ("gap", self.gap_ms, (50, 90, 99)),
            ("tpot", self.token_ms, (50, 99)),
        ):
            for share in shares:
                yield f"{name} p{share}", percentile(values, share), "ms"
        yield "gap max", max(self.gap_ms, default=0.0), "ms"


def read_trace(path: Path) -> list[tuple[int, int]]:
    """Read (prompt, answer) tokens of each request from a CSV of Azure's public traces, plain or .xz.

    Prompts are capped at 4,096 tokens and answers at 800; raises ConfigError when the file is no such trace.
    """
    try:
        data = path.read_bytes()
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
        rows = list(csv.DictReader(io.StringIO(text)))
        lengths = [(int(row[_COLUMNS[0]]), int(row[_COLUMNS[1]])) for row in rows]
    except (OSError, lzma.LZMAError, UnicodeDecodeError, KeyError, ValueError) as error:
        columns = " and ".join(_COLUMNS)
        raise ConfigError(
            f"{path} is no trace: {error}", hint=f"give a CSV file with the columns {columns}"
        ) from error
    return [(min(max(n_in, 1), _MAX_IN), min(max(n_out, 1), _MAX_OUT)) for n_in, n_out in lengths]


async def replay(engine: AsyncEngine, lengths: Sequence[tuple[int, int]], rate: int) -> Replayed:
    """Send the first requests of a trace, at random moments of this mean rate, and note what came when."""
    draw = random.Random(rate)
    lengths = [fit for n in lengths[: RATES[rate]] if (fit := _fitted(n, engine.info.context_tokens))]
    prompts = [random_prompt(draw, engine, n_in) for n_in, _ in lengths]
    dues_s = []
    at_s = 0.0
    for _ in lengths:
        dues_s.append(at_s)
        at_s += draw.expovariate(rate)
    start_s = time.perf_counter()

    async def one(i: int) -> tuple[float, Answered]:
        due_s = start_s + dues_s[i]
        await asyncio.sleep(due_s - time.perf_counter())
        return due_s, await ask(engine, prompts[i], lengths[i][1])

    answers = await asyncio.gather(*(one(i) for i in range(len(lengths))))
    total_s = time.perf_counter() - start_s
    return Replayed(
        rate=rate,
        output_per_s=sum(answer.n_tokens for _, answer in answers) / total_s,
        first_ms=tuple((answer.arrivals[0][0] - due_s) * 1e3 for due_s, answer in answers),
        gap_ms=tuple(gap_s * 1e3 for _, answer in answers for gap_s in answer.gaps_s),
        token_ms=tuple(
            sum(answer.gaps_s) * 1e3 / (answer.n_tokens - 1) for _, answer in answers if answer.n_tokens > 1
        ),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` percent of the values do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share / 100), len(ordered) - 1)] if ordered else 0.0


def _fitted(lengths: tuple[int, int], context_tokens: int) -> tuple[int, int] | None:
    n_in, n_out = lengths
    return (n_in, min(n_out, context_tokens - n_in)) if n_in < context_tokens else None
