"""What a watched engine reports of its decode steps, by a clock that the test holds."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest

from sailfish.bench import steps, watched
from sailfish.engine.step import RowRun, StepPlan, StepResult

HOST_S, WAIT_S, CONVERSION_S = 0.000_2, 0.003, 0.000_01
_NOTHING = StepResult(0, [], [], [], [])


class _Clock:
    def __init__(self) -> None:
        self.now_s = 5.0

    def perf_counter(self) -> float:
        return self.now_s

    def thread_time(self) -> float:
        return self.now_s - 4.0


class _Handle:
    """Waits once; to read it costs the host a little."""

    def __init__(self, clock: _Clock) -> None:
        self.clock, self.wait_s = clock, WAIT_S

    def wait(self) -> None:
        self.clock.now_s += self.wait_s
        self.wait_s = 0.0

    def result(self) -> StepResult:
        self.clock.now_s += self.wait_s + CONVERSION_S
        return _NOTHING


class _Runner:
    def __init__(self, clock: _Clock) -> None:
        self.clock = clock

    def execute(self, plan: StepPlan) -> _Handle:
        self.clock.now_s += HOST_S
        return _Handle(self.clock)


def _decode(n: int) -> StepPlan:
    return StepPlan(0, [], [], [], bytes(4 * n), bytes(4 * n))


def _run(watch: watched.Watch, plans: Sequence[StepPlan]) -> None:
    for plan in plans:
        step = watch.execute(plan)
        step.wait()
        step.result()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> watched.Watch:
    clock = _Clock()
    monkeypatch.setattr(watched, "time", clock)
    return watched.Watch(_Runner(clock), [2, 4], traces=False)


def test_the_hosts_work_is_a_step_without_its_wait(
    watch: watched.Watch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    n = steps.SETTLE_STEPS + steps.WINDOWS * steps.WINDOW_STEPS + 1
    _run(watch, [_decode(2)] * n + [_decode(4)] * n)
    first, second = map(json.loads, capsysbinary.readouterr().out.splitlines())
    assert (first["batch"], second["batch"]) == (2, 4)
    for found in (first, second):
        assert found["host_us"] == pytest.approx([1e6 * (HOST_S + CONVERSION_S)] * steps.WINDOWS)
        assert found["step_us"] == pytest.approx([1e6 * (HOST_S + WAIT_S + CONVERSION_S)] * steps.WINDOWS)


def test_steps_that_follow_each_other_without_prompts_count(
    watch: watched.Watch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    n = steps.SETTLE_STEPS + steps.WINDOWS * steps.WINDOW_STEPS + 1
    mixed = StepPlan(0, [], [], [RowRun(1, 0, 8, True)], bytes(4), bytes(4))
    _run(watch, [_decode(2)] * (n - 1) + [mixed] + [_decode(1)] * n + [_decode(2)] * (n - 1))
    assert not capsysbinary.readouterr().out
    _run(watch, [_decode(2)])
    assert len(capsysbinary.readouterr().out.splitlines()) == 1


def test_the_gpu_rests_where_no_span_covers() -> None:
    draw = random.Random(0)
    for _ in range(50):
        spans = [(at, at + draw.randint(1, 12)) for at in (draw.randint(0, 90) for _ in range(8))]
        inside = [(max(0, a), min(100, b)) for a, b in spans]
        covered = sum(any(a <= tick < b for a, b in inside) for tick in range(100))
        assert steps.idle_percent(spans, 0, 100) == pytest.approx(100 - covered)
    assert steps.idle_percent([], 3.0, 4.0) == 100.0


def test_windows_part_a_trace_without_a_rest() -> None:
    parts = steps.parts_of(2.0, 8.0, 3)
    assert parts == [(2.0, 4.0), (4.0, 6.0), (6.0, 8.0)]


def test_a_steps_kernels_are_told_the_longest_first() -> None:
    found = steps.kernel_us({"short": [(0.0, 1.0)] * 4, "long": [(0.0, 8.0), (9.0, 13.0)]}, 2)
    assert list(found.items()) == [("long", 6.0), ("short", 2.0)]
