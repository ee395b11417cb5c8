"""A step is planned late enough that what arrives while a long one runs is part of the next."""

from __future__ import annotations

import queue
from collections.abc import Callable

import pytest
from fake_runner import Launched, LoopRunner, sampling

from sailfish.engine import loop as engine_loop
from sailfish.engine import wire
from sailfish.engine.foresight import StepTimes
from sailfish.engine.limits import SchedulerLimits
from sailfish.engine.loop import EngineLoop
from sailfish.engine.scheduler import Scheduler
from sailfish.engine.step import StepPlan, StepResult


def test_the_next_plan_is_due_before_the_shortest_like_step_would_end() -> None:
    times = StepTimes()
    assert times.spare_s(1024) == 0.0, "nothing is known yet"
    for elapsed_s in (0.040, 0.030, 0.035):
        times.observe(1030, elapsed_s, 0.01)
    assert 0.02 < times.spare_s(1024) < 0.85 * 0.0315
    assert times.spare_s(2048) == 0.0, "of another size nothing is known"
    for _ in range(60):
        times.observe(1030, 0.060, 0.01)
    assert 0.04 < times.spare_s(1024) < 0.06, "a time that is not reached any more is forgotten"


def test_short_steps_are_followed_at_once() -> None:
    times = StepTimes()
    times.observe(256, 0.009, 0.005)
    assert times.spare_s(256) == 0.0


def test_a_step_that_nobody_waited_for_tells_nothing() -> None:
    times = StepTimes()
    times.observe(256, 0.050, 0.020)
    assert times.spare_s(256) > 0.03
    times.note_launch(0.010)
    assert times.spare_s(256) < 0.85 * 0.050 - 0.009, "the next plan may take as long as the last one"
    times.observe(256, 0.050, 0.0)
    assert times.spare_s(256) == 0.0


class _Inbox:
    """Has a message only for who waits."""

    def __init__(self, messages: list[wire.Submit]) -> None:
        self.messages = messages

    def get_nowait(self) -> tuple[int, wire.Submit]:
        raise queue.Empty

    def get(self, timeout: float) -> tuple[int, wire.Submit]:
        if timeout > 5.0 and self.messages:
            return 0, self.messages.pop()
        raise queue.Empty


def test_what_comes_while_a_long_step_runs_is_in_the_next_one() -> None:
    limits = SchedulerLimits(
        max_sequences=4, step_tokens=64, context_tokens=64, max_queue=9, page_tokens=4, n_blocks=64, lag=1
    )
    runner = LoopRunner(limits)
    scheduler = Scheduler(limits, engine_digest="digest", kv_dtype="float32")
    loop = EngineLoop(scheduler, runner, lambda *_: None, 1, lambda: 0)
    loop.inbox.put((0, wire.Submit(1, [1, 2, 3], sampling(), 8, 0, None, "")))
    loop._take_messages(None)
    loop.step()
    loop.inbox = _Inbox([wire.Submit(2, [1, 1], sampling(), 8, 0, None, "")])  # type: ignore[assignment]
    loop._await_messages()
    assert scheduler.n_waiting == 0, "a short step is not waited for"
    loop._times.observe(3, 100.0, 50.0)
    loop._await_messages()
    loop.step()
    assert [len(plan.starts) for plan in runner.plans] == [1, 1]


class _Clock:
    """Time that passes only where the host or the device works, or somebody waits."""

    def __init__(self, host_s: float, device_s: Callable[[int], float], read_s: float) -> None:
        self.now_s, self.free_s = 0.0, 0.0
        self.host_s, self.device_s, self.read_s = host_s, device_s, read_s

    def monotonic(self) -> float:
        return self.now_s

    def get_nowait(self) -> None:
        raise queue.Empty

    def get(self, timeout: float) -> None:
        self.now_s += timeout
        raise queue.Empty


class _TimedRunner(LoopRunner):
    def __init__(self, limits: SchedulerLimits, clock: _Clock) -> None:
        super().__init__(limits)
        self._clock = clock

    def execute(self, plan: StepPlan) -> Launched:
        clock = self._clock
        begin_s = max(clock.now_s, clock.free_s)
        clock.now_s += clock.host_s
        clock.free_s = end_s = max(begin_s + clock.device_s(len(self.plans)), clock.now_s)
        done = super().execute(plan)

        class Timed(Launched):
            def wait(self) -> None:
                clock.now_s = max(clock.now_s, end_s)

            def result(self) -> StepResult:
                clock.now_s += clock.read_s
                return done.result()

        return Timed(b"")


@pytest.mark.parametrize(
    ("host_s", "device_s", "read_s", "most_s"),
    [
        pytest.param(0.015, lambda _: 0.010, 1e-4, 200 * 0.0152, id="the host is slower"),
        pytest.param(0.008, lambda _: 0.020, 1e-4, 200 * 0.0202, id="the host takes long"),
        pytest.param(0.001, lambda _: 0.020, 0.006, 200 * 0.0202, id="results take long to read"),
        pytest.param(0.010, lambda _: 0.012, 0.006, 200 * 0.0162, id="both take long"),
        pytest.param(0.001, lambda i: 0.02 if i else 3.0, 1e-4, 6.0 + 200 * 0.0202, id="a step stalls"),
    ],
)
def test_late_plans_do_not_lengthen_steps(
    monkeypatch: pytest.MonkeyPatch,
    host_s: float,
    device_s: Callable[[int], float],
    read_s: float,
    most_s: float,
) -> None:
    """200 steps take what the slower of host and device takes, and a stall idles the device but once."""
    clock = _Clock(host_s, device_s, read_s)
    monkeypatch.setattr(engine_loop, "time", clock)
    limits = SchedulerLimits(
        max_sequences=1, step_tokens=8, context_tokens=512, max_queue=9, page_tokens=16, n_blocks=32, lag=1
    )
    scheduler = Scheduler(limits, engine_digest="digest", kv_dtype="float32")
    loop = EngineLoop(scheduler, _TimedRunner(limits, clock), lambda *_: None, 1, lambda: 0)
    loop.inbox.put((0, wire.Submit(1, [1, 2, 3], sampling(), 400, 0, None, "")))
    loop._take_messages(None)
    loop.inbox = clock  # type: ignore[assignment]
    for _ in range(200):
        loop._await_messages()
        loop.step()
    assert clock.now_s < most_s
