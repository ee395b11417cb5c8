"""Everything `sailfish bench engine` measures of one engine: rows to store, and evidence for the engine."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sailfish.artifact.reader import Artifact
from sailfish.artifact.side import append_evidence, read_overlay
from sailfish.artifact.start import software
from sailfish.base.config import EngineConfig
from sailfish.bench import engine as steady
from sailfish.bench import first_token, kv, memory, prefix, steps
from sailfish.bench.named import chosen_for, unlaunched
from sailfish.bench.replay import RATES, replay
from sailfish.bench.results import Recorder, Result
from sailfish.bench.select import is_wanted
from sailfish.engine.client import AsyncEngine
from sailfish.kernels.contract import Choice

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to measure of an engine."""

    name: str
    """What its rows begin with: the model and its formats."""
    only: Sequence[str]
    """Patterns of rows; none: all of them."""
    repeats: int
    batches: Sequence[int]
    device_key: str
    """HardwareProfile.key of the device it runs on."""
    ops: Sequence[Choice] = ()
    """What does each op."""
    trace: Sequence[tuple[int, int]] = ()
    """Lengths of real requests to replay; none: no replay."""

    def has(self, row: str) -> bool:
        """Say whether a row is asked for."""
        return is_wanted(f"{self.name}: {row}", self.only)


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of an engine."""

    row: str
    values: Sequence[float]
    unit: str
    batch: int | None = None
    """Sequences of each step that it measures, if that is one number."""
    kernel_us: Mapping[str, float] = field(default_factory=dict)
    """Of each kernel in a traced step."""


@dataclass(slots=True, kw_only=True)
class _Rows:
    """Makes an engine's rows, tells each as it comes, and keeps them."""

    recorder: Recorder
    wanted: Wanted
    say: Callable[[Result], None]
    downgrades: Sequence[str] = ()
    launches: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    """Of each kernel in a captured decode of up to so many sequences."""
    found: list[Result] = field(default_factory=list)

    def add(self, figure: Figure) -> None:
        """Store a figure, unless the kernels that its engine names were not launched."""
        launches: Mapping[str, int] = {}
        name = f"{self.wanted.name}: {figure.row}"
        if figure.batch is not None and self.launches:
            bucket = min((n for n in self.launches if n >= figure.batch), default=max(self.launches))
            launches = self.launches[bucket]
            if missing := unlaunched(chosen_for(self.wanted.ops, figure.batch), launches):
                log.error("%s: void, its step launches nothing of %s", name, ", ".join(missing))
                return
        result = self.recorder.result(
            name,
            figure.values,
            figure.unit,
            launches=launches,
            downgrades=self.downgrades,
            kernel_us=figure.kernel_us,
        )
        self.found.append(result)
        self.say(result)


async def run_suite(
    engine_dir: Path,
    config: EngineConfig,
    recorder: Recorder,
    wanted: Wanted,
    say: Callable[[Result], None],
) -> list[Result]:
    """Measure what is wanted of an engine in a process of its own, then its start, then its steps."""
    rows = _Rows(recorder=recorder, wanted=wanted, say=say)
    async with await AsyncEngine.start(engine_dir, config=config) as engine:
        rows.downgrades, most = engine.info.downgrades, engine.info.max_sequences
        overlay = read_overlay(Artifact.open(engine_dir), wanted.device_key, software())
        if overlay is not None:
            rows.launches = overlay.launches
        async for figure in _measured(engine, wanted):
            rows.add(figure)
    if wanted.has("start"):
        times_s = [first_token.seconds(engine_dir, config) for _ in range(wanted.repeats)]
        rows.add(Figure("start", times_s, "s"))
    watched = [b for b in wanted.batches if wanted.has(steps.host_row(b)) or wanted.has(steps.idle_row(b))]
    if watched := [b for b in watched if b <= most]:
        async for found in steps.watch(engine_dir, config, watched):
            for row, values, unit in found.figures():
                if wanted.has(row):
                    rows.add(Figure(row, values, unit, found.batch, found.kernel_us))
    return rows.found


async def _measured(engine: AsyncEngine, wanted: Wanted) -> AsyncIterator[Figure]:
    """Yield what is wanted of the running engine."""
    info, repeats = engine.info, wanted.repeats
    reserved_bytes = [(await engine.stats()).reserved_bytes]
    cases = steady.cases_for(info.context_tokens, info.max_sequences, wanted.batches)
    cases = [case for case in cases if wanted.has(case.name)]
    async for case in steady.measure(engine, cases, repeats=repeats):
        batch = case.case.batch if case.case.kind == "decode" else None
        yield Figure(case.case.name, case.values, case.case.unit, batch)
    for share in prefix.SHARES:
        if wanted.has(f"prefix {share} %: requests, lone ttft"):
            for figure in (await prefix.measure_share(engine, share, repeats=repeats)).figures():
                yield Figure(*figure)
    for rate in RATES if wanted.trace else ():
        if wanted.has(f"replay {rate}/s: gap ttft tpot output"):
            replayed = await replay(engine, wanted.trace, rate)
            for name, value, unit in replayed.figures():
                yield Figure(f"replay {rate}/s: {name}", [value], unit)
    if wanted.has(kv.ROW):
        n_in = min(512, info.context_tokens // 4)
        runs = await kv.measure_kv(engine, n_in=n_in, n_out=64, repeats=repeats)
        yield Figure(kv.ROW, kv.gains(runs), "times faster")
    reserved_bytes.append((await engine.stats()).reserved_bytes)
    for row, value, unit in memory.figures(info.memory, reserved_bytes):
        if wanted.has(row):
            yield Figure(row, [value], unit)


def keep_as_evidence(engine_dir: Path, rows: Sequence[Result]) -> None:
    """Append the rows to the engine's own evidence; raises ArtifactError where it cannot be written."""
    artifact = Artifact.open(engine_dir)
    values = {f"{row.row} [{row.unit}]": row.value for row in rows}
    append_evidence(artifact, "speed and memory", values, device=rows[0].device)
