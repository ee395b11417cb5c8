"""Measures an engine through its Python API: tokens per second of prefill and decode, time to first token."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from sailfish.bench.results import Recorder, Result
from sailfish.engine.api import SamplingParams
from sailfish.engine.client import AsyncEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`batch` requests at once, each with `n_in` prompt tokens and `n_out` generated ones."""

    batch: int
    n_in: int
    n_out: int

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.n_in} in, {self.n_out} out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a case."""

    total_s: float
    """From the first submit to the last token."""
    first_s: float
    """Until every request had its first token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All measured runs of a case."""

    case: Case
    runs: tuple[Run, ...]

    @property
    def prefill_per_s(self) -> list[float]:
        """Prompt tokens per second until the last first token, of each run."""
        return [self.case.batch * self.case.n_in / run.first_s for run in self.runs]

    @property
    def decode_per_s(self) -> list[float]:
        """Tokens per second of the steps after that, of each run; none when one token was asked for."""
        n_tokens = self.case.batch * (self.case.n_out - 1)
        return [n_tokens / (run.total_s - run.first_s) for run in self.runs] if n_tokens else []

    def results(self, recorder: Recorder, model: str) -> list[Result]:
        """Return the rows to store."""
        name = f"{model}, {self.case}"
        rows = [recorder.result(f"{name}: time to first token", [r.first_s * 1e3 for r in self.runs], "ms")]
        if self.decode_per_s:
            rows.append(recorder.result(f"{name}: decode", self.decode_per_s, "tokens/s"))
        else:
            rows.append(recorder.result(f"{name}: prefill", self.prefill_per_s, "tokens/s"))
        return rows

    def summary(self) -> str:
        """Return one line for the terminal."""
        if self.decode_per_s:
            rate = f"decode {statistics.median(self.decode_per_s):10.1f} tokens/s"
        else:
            rate = f"prefill {statistics.median(self.prefill_per_s):9.1f} tokens/s"
        first_ms = statistics.median(run.first_s for run in self.runs) * 1e3
        return f"{self.case!s:32} {rate}, first token after {first_ms:.1f} ms"


def cases_for(context_tokens: int, max_sequences: int, batches: Sequence[int]) -> list[Case]:
    """Return the standard cases that fit: one long prefill, and decodes in batches."""
    n_in = min(128, context_tokens // 4)
    n_out = min(256, context_tokens - n_in)
    wanted = [Case(batch=1, n_in=min(2048, context_tokens // 2), n_out=1)]
    wanted += [Case(batch=batch, n_in=n_in, n_out=n_out) for batch in batches]
    return [case for case in wanted if case.batch <= max_sequences]


async def measure(engine: AsyncEngine, cases: Sequence[Case], *, repeats: int) -> AsyncIterator[Measured]:
    """Yield each case measured: one run that does not count, then `repeats` that do."""
    draw = random.Random(0)
    for case in cases:
        runs = [await _run(engine, case, draw) for _ in range(repeats + 1)]
        yield Measured(case=case, runs=tuple(runs[1:]))


async def _run(engine: AsyncEngine, case: Case, draw: random.Random) -> Run:
    params = SamplingParams(max_tokens=case.n_out, temperature=0.0, ignore_eos=True)
    prompts = [draw.choices(range(engine.info.vocab_size), k=case.n_in) for _ in range(case.batch)]
    start_s = time.perf_counter()

    async def one(prompt_ids: list[int]) -> float:
        first_s = 0.0
        async for chunk in await engine.submit(prompt_ids, params):
            if chunk.token_ids and not first_s:
                first_s = time.perf_counter() - start_s
        return first_s

    firsts_s = await asyncio.gather(*(one(prompt_ids) for prompt_ids in prompts))
    return Run(total_s=time.perf_counter() - start_s, first_s=max(firsts_s))
