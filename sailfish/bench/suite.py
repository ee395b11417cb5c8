"""Everything `sailfish bench` measures of one engine: rows to store, and evidence for the engine itself."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

from sailfish.artifact.reader import Artifact
from sailfish.artifact.side import Evidence, append_evidence
from sailfish.base.config import EngineConfig
from sailfish.bench import engine as speed
from sailfish.bench import kv, memory
from sailfish.bench.results import Recorder, Result
from sailfish.engine.client import AsyncEngine


async def run_suite(
    engine_dir: Path,
    config: EngineConfig,
    recorder: Recorder,
    *,
    batches: Sequence[int],
    repeats: int,
    say: Callable[[str], None],
) -> list[Result]:
    """Measure speed, the worth of the KV cache and memory; `say` is told each figure as it comes."""
    rows: list[Result] = []
    async with await AsyncEngine.start(engine_dir, config=config) as engine:
        info, name = engine.info, f"{engine.info.name} {engine.info.dtype}"
        reserved_bytes = [(await engine.stats()).reserved_bytes]
        cases = speed.cases_for(info.context_tokens, info.max_sequences, batches)
        async for case in speed.measure(engine, cases, repeats=repeats):
            say(case.summary())
            rows += case.results(recorder, name)
        n_in = min(512, info.context_tokens // 4)
        runs = await kv.measure_kv(engine, n_in=n_in, n_out=64, repeats=repeats)
        rows += kv.results(runs, recorder, name)
        same = f"same tokens in {sum(run.is_same for run in runs)} of {len(runs)} runs"
        say(f"KV cache {rows[-1].value:.1f} times faster than recomputing, {same}")
        reserved_bytes.append((await engine.stats()).reserved_bytes)
        rows += memory.results(info.memory, reserved_bytes, recorder, name)
        say(f"memory plan against measured, without KV blocks: {memory.error_percent(info.memory):+.2f} %")
    return rows


def keep_as_evidence(engine_dir: Path, rows: Sequence[Result]) -> None:
    """Append the rows to the engine's own evidence; raises ArtifactError where it cannot be written."""
    artifact = Artifact.open(engine_dir)
    evidence = Evidence(
        manifest=artifact.digest,
        kind="speed and memory",
        at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        device=rows[0].device,
        values={f"{row.row} [{row.unit}]": row.value for row in rows},
    )
    append_evidence(artifact, evidence)
