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
    n_after: int
    """Tokens that came after `first_s`: by then no step holds a prompt any more."""


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
        return [run.n_after / (run.total_s - run.first_s) for run in self.runs if run.n_after]

    @property
    def output_per_s(self) -> list[float]:
        """Generated tokens per second over everything, of each run."""
        return [self.case.batch * self.case.n_out / run.total_s for run in self.runs]

    def results(self, recorder: Recorder, model: str) -> list[Result]:
        """Return the rows to store."""
        name = f"{model}, {self.case}"
        rows = [recorder.result(f"{name}: time to first token", [r.first_s * 1e3 for r in self.runs], "ms")]
        if self.decode_per_s:
            rows.append(recorder.result(f"{name}: decode", self.decode_per_s, "tokens/s"))
            rows.append(recorder.result(f"{name}: output", self.output_per_s, "tokens/s"))
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
    """Return the standard cases that fit: prefills, decodes in batches, and twice the rows of mixed work."""
    n_in = min(128, context_tokens // 4)
    n_out = min(256, context_tokens - n_in)
    n_long = min(2048, context_tokens // 2)
    wanted = [Case(batch=batch, n_in=n_long, n_out=1) for batch in (1, 64)]
    wanted += [Case(batch=batch, n_in=n_in, n_out=n_out) for batch in batches]
    fitting = [case for case in wanted if case.batch <= max_sequences]
    n_mixed = min(512, context_tokens // 2)
    return [*fitting, Case(batch=2 * max_sequences, n_in=n_mixed, n_out=min(n_out, context_tokens - n_mixed))]


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

    async def one(prompt_ids: list[int]) -> list[tuple[float, int]]:
        arrivals = []
        async for chunk in await engine.submit(prompt_ids, params):
            arrivals.append((time.perf_counter() - start_s, len(chunk.token_ids)))
        return arrivals

    answers = await asyncio.gather(*(one(prompt_ids) for prompt_ids in prompts))
    total_s = time.perf_counter() - start_s
    first_s = max(arrivals[0][0] for arrivals in answers)
    n_after = sum(n for arrivals in answers for at_s, n in arrivals if at_s > first_s)
    return Run(total_s=total_s, first_s=first_s, n_after=n_after)
