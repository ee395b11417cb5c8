"""What a step sends to the host is there when the host has waited for its draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from local_engine import LocalEngine, greedy

from sailfish.base.config import EngineConfig
from sailfish.data import demo_model
from sailfish.engine.table import DeviceTable
from sailfish.engine.transfer import download


def test_the_draws_are_the_last_that_a_step_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits for the draws alone, and then reads the log-probabilities too."""
    sent: list[str] = []
    take_draws = DeviceTable.take_draws

    def note_download(tensor: Any) -> Any:
        sent.append("log-probabilities")
        return download(tensor)

    def note_draws(table: DeviceTable, n_samples: int) -> Any:
        sent.append("draws")
        return take_draws(table, n_samples)

    monkeypatch.setattr("sailfish.engine.runner.download", note_download)
    monkeypatch.setattr(DeviceTable, "take_draws", note_draws)
    config = EngineConfig(page_tokens=8, step_tokens=16, max_sequences=2, context_tokens=64)
    engine = LocalEngine.build(demo_model(), tmp_path / "engine", config)
    engine.submit(0, [1, 2, 3, 4, 5], greedy(8192, logprobs=2, prompt_logprobs=1), 4)
    ends: list[str] = []
    execute = engine.loop.runner.execute

    def note_end(plan: Any) -> Any:
        step = execute(plan)
        ends.append(sent[-1])
        return step

    monkeypatch.setattr(engine.loop.runner, "execute", note_end)
    engine.run()
    assert ends and set(ends) == {"draws"}
    assert sent.count("log-probabilities") > len(ends)
