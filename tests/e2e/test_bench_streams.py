"""Streams held open against an engine without a model: all of them end, and every token is counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from sailfish.base.config import EngineConfig
from sailfish.bench.paced import PacedRunner
from sailfish.bench.streams import carry, paced_server
from sailfish.build.cache import find_or_build
from sailfish.engine.step import RowRun, StepPlan


@pytest.fixture(scope="module")
def engine_dir() -> Path:
    """The packaged model's engine, of which only the tokenizer and the names are used."""
    return find_or_build("books-4m", EngineConfig(device="cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("n_processes", [1, 2])
def test_every_token_of_every_stream_arrives(engine_dir: Path, n_processes: int) -> None:
    with paced_server(engine_dir, n_processes, 48, step_ms=5.0) as server:
        carried = carry(server, engine_dir, n_streams=48, n_out=24, seed=0)
        again = carry(server, engine_dir, n_streams=48, n_out=24, seed=1)
    assert len(server.api_pids) == n_processes
    for run in (carried, again):
        assert len(run.first_ms) == 48
        assert run.tokens_per_s > 0
        assert run.tokens_per_event >= 1.0
        assert run.api_us_per_token is not None and run.api_us_per_token > 0
    assert [unit for _, _, unit in carried.figures()][:2] == ["tokens/s", "tokens"]


def test_paced_steps_draw_for_the_runs_that_sample_and_follow_each_other() -> None:
    runner = PacedRunner(step_s=0.001, vocab_size=10)
    runs = [RowRun(0, 0, 4, True), RowRun(1, 0, 4, False), RowRun(2, 3, 1, True)]
    first = runner.execute(StepPlan(step_id=0, starts=[], appended=[], spans=runs))
    second = runner.execute(StepPlan(step_id=1, starts=[], appended=[], spans=runs[:1]))
    result = first.result()
    assert (len(result.token_ids), result.finite, len(result.prompt_logprobs)) == (2, [True, True], 3)
    assert all(0 <= token_id < 10 for token_id in result.token_ids)
    assert len(second.result().token_ids) == 1
    assert second.ends_s >= first.ends_s + 0.001
