"""The memory plan of a real engine process against what it really took."""

from __future__ import annotations

from pathlib import Path

import pytest

import sailfish
from sailfish.bench.memory import error_percent
from sailfish.build.builder import build_engine
from sailfish.data import demo_model

pytestmark = pytest.mark.slow


def test_the_planned_sum_is_within_2_percent_of_the_measured_one(tmp_path: Path) -> None:
    build_engine(demo_model(), tmp_path / "engine", target="cpu")
    with sailfish.Engine(tmp_path / "engine") as first:
        cold = error_percent(first.info.memory)
        kv_blocks = next(line for line in first.info.memory if line.name == "kv_blocks")
    with sailfish.Engine(tmp_path / "engine") as second:
        lines = {line.name: line for line in second.info.memory}
        assert abs(error_percent(second.info.memory)) <= 2.0, lines
    # The first start knows the runtime of a typical machine only; it is most of a small model's memory.
    assert abs(cold) <= 10.0
    assert kv_blocks.measured_bytes == pytest.approx(kv_blocks.planned_bytes, rel=0.01)
    for name in ("weights", "activations"):
        assert lines[name].measured_bytes == pytest.approx(lines[name].planned_bytes, abs=4 << 20)


def test_memory_does_not_grow_after_ready(tmp_path: Path) -> None:
    build_engine(demo_model(), tmp_path / "engine", target="cpu")
    with sailfish.Engine(tmp_path / "engine") as engine:
        params = sailfish.SamplingParams(max_tokens=60, temperature=0.9, logprobs=5, top_p=0.9)
        before = engine.stats().reserved_bytes
        for _ in range(3):
            engine.generate_many([[5 + i] * (40 * i + 1) for i in range(24)], params)
        assert engine.stats().reserved_bytes - before < 64 * 2**20
