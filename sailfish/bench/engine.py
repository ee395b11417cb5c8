"""Measures an engine through its Python API: tokens per second of prefill and decode, time to first token."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sailfish.engine.api import SamplingParams
from sailfish.engine.client import AsyncEngine
from sailfish.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`batch` requests at once, each with `n_in` prompt tokens and `n_out` generated ones."""

    name: str
    batch: int
    n_in: int
    n_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured case: the median run, all runs, and where and how it was measured."""

    case: str
    batch: int
    n_in: int
    n_out: int
    s: float
    """Seconds from the first submit to the last token; the median of `all_s`."""
    all_s: list[float]
    ttft_ms: float
    """Until every request of the batch had its first token."""
    prefill_tok_s: float
    """batch * n_in / time to the last first token."""
    decode_tok_s: float | None
    """batch * (n_out - 1) / (s - ttft): the steps that only decode."""
    ms_per_step: float | None
    model: str
    engine_digest: str
    device: str
    device_name: str
    dtype: str
    version: str
    command: str

    def to_json(self) -> str:
        """Return the row as one line of JSON."""
        return json.dumps(asdict(self))


def cases_for(context_tokens: int, max_sequences: int, batches: Sequence[int]) -> list[Case]:
    """Return the standard cases that fit: a prefill, one lone decode, and decodes in batches."""
    n_prefill = min(2048, context_tokens // 2)
    n_in = min(128, context_tokens // 4)
    n_out = min(256, context_tokens - n_in)
    wanted = [Case(name="prefill", batch=1, n_in=n_prefill, n_out=1)]
    wanted += [Case(name="decode", batch=batch, n_in=n_in, n_out=n_out) for batch in batches]
    return [case for case in wanted if case.batch <= max_sequences]


async def measure(
    engine: AsyncEngine, cases: Sequence[Case], *, repeats: int, device_name: str, command: str
) -> AsyncIterator[Row]:
    """Yield a row for each case: one unmeasured run, then `repeats` measured ones."""
    draw = random.Random(0)
    for case in cases:
        runs = [await _run(engine, case, draw) for _ in range(repeats + 1)][1:]
        total_s, first_s = sorted(runs)[len(runs) // 2]
        steps_s = total_s - first_s
        info = engine.info
        yield Row(
            case=case.name,
            batch=case.batch,
            n_in=case.n_in,
            n_out=case.n_out,
            s=round(total_s, 5),
            all_s=[round(run[0], 5) for run in runs],
            ttft_ms=round(statistics.median(run[1] for run in runs) * 1e3, 3),
            prefill_tok_s=round(case.batch * case.n_in / first_s, 1),
            decode_tok_s=round(case.batch * (case.n_out - 1) / steps_s, 1) if case.n_out > 1 else None,
            ms_per_step=round(steps_s / (case.n_out - 1) * 1e3, 4) if case.n_out > 1 else None,
            model=info.name,
            engine_digest=info.digest,
            device=info.device,
            device_name=device_name,
            dtype=info.dtype,
            version=__version__,
            command=command,
        )


async def _run(engine: AsyncEngine, case: Case, draw: random.Random) -> tuple[float, float]:
    """Return (seconds to the last token, seconds to the last first token) of one run."""
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
    return time.perf_counter() - start_s, max(firsts_s)


def store(rows: Sequence[Row], path: Path) -> None:
    """Append rows to a file of JSON lines, making its folder when it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(row.to_json() + "\n" for row in rows)
