"""What engines reach on the CPU, a column for each set of number formats, alone or in turns with others."""

from __future__ import annotations

import asyncio
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sailfish.base.config import EngineConfig
from sailfish.bench import engine as steady
from sailfish.bench import first_token
from sailfish.bench.engine import Case
from sailfish.bench.results import Recorder, Result
from sailfish.bench.streams import Server, carry, real_server
from sailfish.engine.api import SamplingParams
from sailfish.engine.client import AsyncEngine
from sailfish.engine.sync import Engine

SHAPE = "llama-3.2-1b"
CLIENTS, CONTEXT_TOKENS = 16, 1024
ONE = Case(kind="decode", batch=1, n_in=128, n_out=64)
MANY = Case(kind="decode", batch=CLIENTS, n_in=128, n_out=64)
PREFILL = Case(kind="prefill", batch=1, n_in=512, n_out=1)
CASES = (ONE, MANY, PREFILL)
HTTP, THREADS, START, IMPORTS = f"http x {CLIENTS}", f"{CLIENTS} threads over 1", "start", "start: imports"
ROWS = (*(case.name for case in CASES), THREADS, START, HTTP)
"""What is measured, or the beginning of its rows' names."""
_TARGETS: Mapping[str, float] = {THREADS: 3.0, START: 2.0}
"""Of figures that have no other engine beside them."""
_HTTP_TOKENS, _THREAD_IN, _THREAD_OUT = 64, 32, 32
_IMPORTED = ("sailfish.bench.first_token", "sailfish.engine.worker")
"""By the process that asks and by the engine's, one after the other."""
_LOWER = frozenset({"ms", "s"})
"""Units of which less is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One engine's number formats, and those of other engines that it is compared with."""

    config: EngineConfig
    rivals: tuple[str, ...] = ()
    """Formats as llama.cpp calls them."""
    targets: Mapping[str, float] = field(default_factory=dict)
    """Least ratio to the best of them, by row."""


def _config(dtype: str | None = None, *, weights: str | None = None, head: str | None = None) -> EngineConfig:
    return EngineConfig(
        device="cpu",
        dtype=dtype,
        weights=weights,
        head=head,
        embedding=None if head is None else "int8",
        context_tokens=CONTEXT_TOKENS,
        max_sequences=CLIENTS,
    )


COLUMNS: Mapping[str, Column] = {
    "int4, int8 head and embedding": Column(
        config=_config(weights="int4", head="int8"),
        rivals=("Q4_0", "Q4_K_M"),
        targets={ONE.name: 1.15, MANY.name: 3.0, PREFILL.name: 1.8},
    ),
    "int4, int4 head, int8 embedding": Column(config=_config(weights="int4", head="int4")),
    "int8, int8 head and embedding": Column(
        config=_config(weights="int8", head="int8"),
        rivals=("Q8_0",),
        targets={ONE.name: 1.25, PREFILL.name: 2.5},
    ),
    "bfloat16": Column(
        config=_config("bfloat16"), rivals=("BF16",), targets={ONE.name: 1.05, PREFILL.name: 1.2}
    ),
}
"""By what a row says of the formats."""


class Rival(Protocol):
    """Another engine, with a model of the same shape in one of its formats."""

    @property
    def name(self) -> str:
        """What its rows call it."""

    def rate(self, case: Case) -> float:
        """Return the figure of one run, in the case's unit."""

    def serve(self, n_sequences: int) -> AbstractContextManager[Server]:
        """Serve completions over HTTP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """One figure, measured in turns: theirs, ours, theirs, ours and so on."""

    row: str
    unit: str
    ours: Sequence[float]
    theirs: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """By the other engine's name."""

    def best(self) -> str | None:
        """Return which of the others has the best median; None without others."""
        pick = min if self.unit in _LOWER else max
        return pick(self.theirs, key=lambda name: statistics.median(self.theirs[name]), default=None)

    def ratios(self, other: str) -> list[float]:
        """Return how many times as good as another we were in each turn."""
        pairs = zip(self.ours, self.theirs[other], strict=True)
        return [b / a if self.unit in _LOWER else a / b for a, b in pairs]


async def measure(
    engine_dir: Path,
    config: EngineConfig,
    flags: Sequence[str],
    rivals: Sequence[Rival],
    *,
    rows: Sequence[str],
    repeats: int,
) -> AsyncIterator[Turns]:
    """Yield the figures of an engine for some of ROWS, each of its runs after one of every rival.

    `flags` are `config` as `sailfish serve` takes it. The engine stays up, idle, while rivals run.
    """
    cases = [case for case in CASES if case.name in rows]
    if cases:
        async with await AsyncEngine.start(engine_dir, config=config) as engine:
            for case in cases:
                yield await _case(engine, case, rivals, repeats)
    if THREADS in rows:
        yield Turns(row=THREADS, unit="x", ours=_gains(engine_dir, config, repeats))
    if START in rows:
        times_s = [first_token.seconds(engine_dir, config) for _ in range(repeats)]
        yield Turns(row=START, unit="s", ours=times_s)
        yield Turns(row=IMPORTS, unit="s", ours=[_imports_s() for _ in range(repeats)])
    if HTTP in rows:
        for turns in _http(engine_dir, flags, rivals, repeats):
            yield turns


def results(recorder: Recorder, model: str, column: str, turns: Turns, kernels: str) -> list[Result]:
    """Return the rows of a figure: ours beside the best of the others, theirs, and the ratio to the best.

    `kernels`: what does our products.
    """
    name, best = f"{model} {column}: {turns.row}", turns.best()
    if best is None:
        target = _TARGETS.get(turns.row)
        return [recorder.result(name, turns.ours, turns.unit, target=target, implementation=kernels)]
    middle = statistics.median(turns.theirs[best])
    ours = recorder.result(name, turns.ours, turns.unit, peer=best, peer_value=middle, implementation=kernels)
    rows = [ours]
    for rival, runs in turns.theirs.items():
        rows.append(recorder.result(f"{model} {rival}: {turns.row}", runs, turns.unit))
    target = COLUMNS[column].targets.get(turns.row)
    ratio = recorder.result(f"{name}, over {best}", turns.ratios(best), "x", target=target)
    return [*rows, ratio]


def is_met(row: Result) -> bool | None:
    """Say whether one of these rows meets its target; None without one."""
    if row.target is None:
        return None
    return row.value <= row.target if row.unit in _LOWER else row.value >= row.target


async def _case(engine: AsyncEngine, case: Case, rivals: Sequence[Rival], repeats: int) -> Turns:
    theirs: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    ours: list[float] = []
    for turn in range(repeats):
        for rival in rivals:
            theirs[rival.name].append(await asyncio.to_thread(rival.rate, case))
        async for measured in steady.measure(engine, [case], repeats=1, seed=turn):
            ours += measured.values
    return Turns(row=case.name, unit=case.unit, ours=ours, theirs=theirs)


def _http(engine_dir: Path, flags: Sequence[str], rivals: Sequence[Rival], repeats: int) -> Iterator[Turns]:
    """Yield what all clients together saw of each server, all servers up, one under load at a time."""
    with ExitStack() as stack:
        servers = {rival.name: stack.enter_context(rival.serve(CLIENTS)) for rival in rivals}
        servers[""] = stack.enter_context(real_server(str(engine_dir), 1, flags))
        runs: dict[str, list[list[tuple[str, float, str]]]] = {name: [] for name in servers}
        for server in servers.values():
            carry(server, engine_dir, CLIENTS, 2, seed=repeats)
        for turn in range(repeats):
            for name, server in servers.items():
                carried = carry(server, engine_dir, CLIENTS, _HTTP_TOKENS, seed=turn)
                runs[name].append(list(carried.figures()))
    for i, (row, _, unit) in enumerate(runs[""][0]):
        if unit == "tokens":  # an event: how many deltas were joined is no contest
            continue
        values = {name: [figures[i][1] for figures in of_server] for name, of_server in runs.items()}
        yield Turns(row=f"{HTTP}: {row}", unit=unit, ours=values.pop(""), theirs=values)


def _gains(engine_dir: Path, config: EngineConfig, repeats: int) -> list[float]:
    """Return how many times the tokens of one thread many threads get of one model in one process."""
    draw = random.Random(0)
    params = SamplingParams(max_tokens=_THREAD_OUT, temperature=0.0, ignore_eos=True)
    with Engine(engine_dir, config=config) as engine, ThreadPoolExecutor(CLIENTS) as threads:

        def rate(n_threads: int) -> float:
            vocabulary = range(engine.info.vocab_size)
            prompts = [draw.choices(vocabulary, k=_THREAD_IN) for _ in range(n_threads)]
            start_s = time.perf_counter()
            list(threads.map(lambda prompt: engine.generate(prompt, params), prompts))
            return n_threads * _THREAD_OUT / (time.perf_counter() - start_s)

        rate(1)
        alone = [rate(1) for _ in range(repeats)]
        return [rate(CLIENTS) / one for one in alone]


def _imports_s() -> float:
    """Return how long the interpreters of a start and all that they import take."""
    start_s = time.perf_counter()
    for module in _IMPORTED:
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start_s
