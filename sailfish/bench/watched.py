"""An engine process that watches its own decodes: the host's work, then the device in a profiler's trace."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from sailfish.base import log
from sailfish.base.config import EngineConfig
from sailfish.base.sources import environment
from sailfish.bench import steps
from sailfish.bench.child import serve
from sailfish.bench.steps import Span, Watched
from sailfish.engine.boot import boot
from sailfish.engine.limits import SchedulerLimits
from sailfish.engine.loop import Runner, StepHandle
from sailfish.engine.scheduler import Scheduler
from sailfish.engine.step import StepPlan, StepResult
from sailfish.engine.worker import info_of

_TEMPLATE = re.compile(r"^void |[<(].*")
"""What stands around the name of a kernel that is a C++ template."""
_UNTRACED = steps.SETTLE_STEPS + steps.WINDOWS * steps.WINDOW_STEPS


class _Timed:
    """A launched step whose wait is counted, in processor time of the loop's thread: a wait spins."""

    def __init__(self, handle: StepHandle, watch: Watch) -> None:
        self._handle, self._watch = handle, watch

    def wait(self) -> None:
        """Wait for the step."""
        begin_s = time.thread_time()
        self._handle.wait()
        self._watch.waited_s += time.thread_time() - begin_s

    def result(self) -> StepResult:
        """Return the step's tokens, which have been waited for."""
        return self._handle.result()


class Watch:
    """A runner that hands steps on, and reports once so many full decodes have followed each other."""

    def __init__(self, runner: Runner, batches: list[int], *, traces: bool) -> None:
        self.waited_s = 0.0
        self._runner, self._batches, self._traces = runner, batches, traces
        self._n_steps = 0
        self._window: tuple[float, float] = (0.0, 0.0)
        """When the current one began, and the thread's processor time without waits until then."""
        self._host_us: list[float] = []
        self._step_us: list[float] = []
        self._profile: Any = None

    def execute(self, plan: StepPlan) -> StepHandle:
        """Launch a step, and note it if it is one of those watched."""
        if self._batches and plan.n_decodes == plan.n_runs == self._batches[0]:
            self._note()
        elif self._profile is None:
            self._begin_again()
        return _Timed(self._runner.execute(plan), self)

    def _note(self) -> None:
        now_s, worked_s = time.perf_counter(), time.thread_time() - self.waited_s
        n_counted = self._n_steps - steps.SETTLE_STEPS
        if n_counted > 0 and n_counted % steps.WINDOW_STEPS == 0 and self._n_steps <= _UNTRACED:
            begin_s, before_s = self._window
            self._step_us.append(1e6 * (now_s - begin_s) / steps.WINDOW_STEPS)
            self._host_us.append(1e6 * (worked_s - before_s) / steps.WINDOW_STEPS)
        if n_counted >= 0 and n_counted % steps.WINDOW_STEPS == 0:
            self._window = now_s, worked_s
        if self._n_steps == _UNTRACED and self._traces:
            self._profile = _started_profile()
        if self._n_steps == _UNTRACED + (steps.TRACED_STEPS if self._traces else 0):
            self._report()
            return
        self._n_steps += 1

    def _begin_again(self) -> None:
        self._n_steps, self._host_us, self._step_us = 0, [], []

    def _report(self) -> None:
        idle, kernels = _read(self._profile) if self._profile is not None else ([], {})
        found = Watched(
            batch=self._batches.pop(0),
            host_us=self._host_us,
            step_us=self._step_us,
            idle_percent=idle,
            kernel_us=kernels,
        )
        self._profile = None
        self._begin_again()
        sys.stdout.buffer.write(msgspec.json.encode(found) + b"\n")
        sys.stdout.flush()


def _started_profile() -> Any:
    from torch.profiler import ProfilerActivity, profile

    found = profile(activities=[ProfilerActivity.CUDA], acc_events=True)
    found.start()
    return found


def _read(profile: Any) -> tuple[list[float], dict[str, float]]:
    """Return the rest of the device in each window, and the time of each kernel in a step."""
    profile.stop()
    by_name: dict[str, list[Span]] = {}
    for event in profile.events():
        if event.device_type.name == "CUDA":
            name = _TEMPLATE.sub("", event.name)
            by_name.setdefault(name, []).append((event.time_range.start, event.time_range.end))
    spans = sorted(span for found in by_name.values() for span in found)
    # The first part is the profiler's own start, with steps that were on their way.
    begin, end = spans[len(spans) // 4][0], spans[-1][1]
    windows = steps.parts_of(begin, end, steps.WINDOWS)
    return [steps.idle_percent(spans, *window) for window in windows], steps.kernel_us(
        by_name, steps.TRACED_STEPS
    )


def main() -> None:
    """Serve on a socket until the standard input closes or a signal comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--batches", required=True)
    args = parser.parse_args()
    log.configure(level="warning")
    config = msgspec.json.decode(args.config, type=EngineConfig)
    booted = boot(args.engine, config, environment(), lambda *_: None)
    plan, artifact = booted.plan, booted.artifact
    batches = [int(word) for word in args.batches.split(",")]
    runner = Watch(booted.runner, batches, traces=plan.device == "cuda")
    scheduler = Scheduler(SchedulerLimits.of(plan), engine_digest=artifact.digest, kv_dtype=plan.kv_dtype)
    serve(args.socket, info_of(booted, None, 0.0), scheduler, runner, plan.lag)


if __name__ == "__main__":
    main()
