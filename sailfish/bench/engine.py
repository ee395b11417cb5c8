"""Measures an engine's decode, prefill and throughput, by the definitions that the peers were measured by."""

from __future__ import annotations

import random
import statistics
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal

from sailfish.bench.asking import ask_together, random_prompt
from sailfish.engine.client import AsyncEngine

Kind = Literal["decode", "generate", "ttft", "prefill", "tput"]
BATCHES = (1, 16, 64, 256)
_WARM_TOKENS, _WARM_REQUESTS = 8, 64
_FIRST_RUNS = 3
_TTFT_RUNS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`batch` requests at once, each with `n_in` prompt tokens and `n_out` generated ones.

    decode: tokens per second of the steps alone: the time for one token each is taken off. generate and
    tput: generated tokens per second over everything. ttft: until the first token. prefill: prompt tokens per
    second until all have their first.
    """

    kind: Kind
    batch: int
    n_in: int
    n_out: int

    @property
    def name(self) -> str:
        """Return what its row is called; the lengths are named where they are not the usual ones."""
        match self.kind:
            case "decode":
                usual = (128, 512 if self.batch == 1 else 256)
                lengths = "" if (self.n_in, self.n_out) == usual else f" ({self.n_in} in, {self.n_out} out)"
                return f"decode B={self.batch}{lengths}"
            case "generate":
                return f"generate B={self.batch} ({self.n_in} in, {self.n_out} out)"
            case "ttft":
                return f"ttft {self.n_in}"
            case "prefill":
                return f"prefill {self.batch} x {self.n_in}"
            case "tput":
                return f"tput {self.batch} x ({self.n_in} in, {self.n_out} out)"

    @property
    def unit(self) -> str:
        """Return the unit of its figure."""
        return "ms" if self.kind == "ttft" else "tokens/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The figures of a case, one for each run."""

    case: Case
    values: tuple[float, ...]


def cases_for(context_tokens: int, max_sequences: int, batches: Sequence[int]) -> list[Case]:
    """Return the standard cases, shortened where they do not fit the engine."""
    n_in = min(128, context_tokens // 4)
    n_long = min(2048, context_tokens // 2)
    n_mixed = min(512, context_tokens // 2)
    cases = [
        Case(kind="decode", batch=b, n_in=n_in, n_out=min(512 if b == 1 else 256, context_tokens - n_in))
        for b in batches
        if b <= max_sequences
    ]
    cases += [
        Case(kind="generate", batch=b, n_in=n_in, n_out=min(256, context_tokens - n_in))
        for b in batches
        if b <= max_sequences
    ]
    cases.append(Case(kind="ttft", batch=1, n_in=n_long, n_out=1))
    cases.append(Case(kind="prefill", batch=min(64, max_sequences), n_in=n_long, n_out=1))
    n_out = min(256, context_tokens - n_mixed)
    cases.append(Case(kind="tput", batch=min(512, 2 * max_sequences), n_in=n_mixed, n_out=n_out))
    return cases


async def measure(
    engine: AsyncEngine, cases: Sequence[Case], *, repeats: int, seed: int = 0
) -> AsyncIterator[Measured]:
    """Yield each case measured, after a few tokens that do not count; another seed draws other prompts."""
    draw = random.Random(seed)
    for case in cases:
        most = None if case.kind in ("decode", "generate") else _WARM_REQUESTS
        await _seconds(engine, case, min(case.n_out, _WARM_TOKENS), draw, most=most)
        n_runs = max(repeats, _TTFT_RUNS) if case.kind == "ttft" else repeats
        first_s = 0.0
        if case.kind == "decode":
            first_s = statistics.median([await _seconds(engine, case, 1, draw) for _ in range(_FIRST_RUNS)])
        values = [await _value(engine, case, first_s, draw) for _ in range(n_runs)]
        yield Measured(case=case, values=tuple(values))


async def _value(engine: AsyncEngine, case: Case, first_s: float, draw: random.Random) -> float:
    """Return the figure of one run; `first_s`: what one token each takes, of a decode."""
    total_s = await _seconds(engine, case, case.n_out, draw)
    match case.kind:
        case "decode":
            return case.batch * (case.n_out - 1) / (total_s - first_s)
        case "ttft":
            return total_s * 1e3
        case "prefill":
            return case.batch * case.n_in / total_s
        case "generate" | "tput":
            return case.batch * case.n_out / total_s


async def _seconds(
    engine: AsyncEngine, case: Case, n_out: int, draw: random.Random, *, most: int | None = None
) -> float:
    """Return how long all requests of a case, or the first `most`, take together, every prompt a new one."""
    prompts = [random_prompt(draw, engine, case.n_in) for _ in range(case.batch)][:most]
    total_s, _ = await ask_together(engine, prompts, n_out)
    return total_s
