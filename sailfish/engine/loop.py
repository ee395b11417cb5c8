"""The engine's one loop: take messages, plan a step, run it, tell the clients. No torch, no sockets.

At lag 1 step n+1 is planned and launched before the tokens of step n are known, though not long before: what
arrives while a long step runs is part of the next one.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from sailfish.base.errors import EngineError, SailfishError
from sailfish.engine import wire
from sailfish.engine.api import EngineStats
from sailfish.engine.foresight import StepTimes
from sailfish.engine.scheduler import Scheduler
from sailfish.engine.sequence import Draws, Sequence, SequenceEvent
from sailfish.engine.step import StepPlan, StepResult

log = logging.getLogger(__name__)

_NO_CLIENT = -1
_IDLE_WAIT_S = 0.5
"""How long an idle loop waits for a message; a message wakes it at once."""
_MAX_FAILED_STEPS = 8
"""A device that fails so many steps in a row (a CUDA fault never heals) needs a new process."""


class StepHandle(Protocol):
    """A launched step."""

    def wait(self) -> None:
        """Return once the device has ended the step; may raise what the step raised."""

    def result(self) -> StepResult:
        """Wait for the step and return what it produced; raises what the step raised."""


class Runner(Protocol):
    """Whatever executes steps."""

    def execute(self, plan: StepPlan) -> StepHandle:
        """Launch a step and return without waiting for its tokens."""


class Disconnect:
    """Loop message: a client's connection ended."""


class _Launched(NamedTuple):
    """A step in flight."""

    step_id: int
    handle: StepHandle
    n_tokens: int
    at_s: float


class EngineLoop:
    """Drive one scheduler and one runner until told to stop.

    `inbox` holds (client id, message); `send(client id, message)` must not block. The thread that calls
    `run` is the only one that touches the scheduler.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        send: Callable[[int, wire.ToClient], None],
        lag: int,
        reserved_bytes: Callable[[], int],
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.inbox: queue.SimpleQueue[tuple[int, wire.ToEngine | Disconnect]] = queue.SimpleQueue()
        self.step_started_s: float | None = None
        """Monotonic time since which the loop has been inside a step; read by the heartbeat."""
        self._send = send
        self._lag = lag
        self._reserved_bytes = reserved_bytes
        self._in_flight: deque[_Launched] = deque()
        self._times = StepTimes()
        self._last_end_s = 0.0
        self._drain_until_s: float | None = None
        self._n_failed = 0
        """Steps that failed one after the other."""

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused because the engine is about to stop."""
        return self._drain_until_s is not None

    def ask_to_end(self, within_s: float) -> None:
        """Have the loop drain as a client can, from any thread and from a signal's handler."""
        self.inbox.put((_NO_CLIENT, wire.Drain(within_s)))

    def run(self) -> None:
        """Serve until a drain has ended; raises EngineError when the device fails step after step."""
        while not (self.is_draining and self.scheduler.is_idle and not self._in_flight):
            is_idle = self.scheduler.is_idle and not self._in_flight
            self._take_messages(_IDLE_WAIT_S if is_idle else None)
            self._await_messages()
            now_s = time.monotonic()
            if self._drain_until_s is not None and now_s >= self._drain_until_s:
                self._emit(self.scheduler.abort_all(now_s))
            self.step()

    def step(self) -> None:
        """Plan and launch one step, and commit the oldest one once more than `lag` are in flight."""
        self.step_started_s = time.monotonic()
        plan, events = self.scheduler.schedule(self.step_started_s)
        if events:
            self._emit(events)
        if plan is not None:
            try:
                handle = self.runner.execute(plan)
                self._in_flight.append(_Launched(plan.step_id, handle, plan.n_tokens, self.step_started_s))
                self._times.note_launch(time.monotonic() - self.step_started_s)
            except Exception as error:  # noqa: BLE001 - a step's fault ends its own sequences, not the engine
                self._fail(plan.step_id, error)
        if self._in_flight and (plan is None or len(self._in_flight) > self._lag):
            step = self._in_flight.popleft()
            asked_s = time.monotonic()
            try:
                step.handle.wait()
                ended_s = time.monotonic()
                result = step.handle.result()
            except Exception as error:  # noqa: BLE001 - as above
                self._fail(step.step_id, error)
            else:
                self._n_failed = 0
                elapsed_s = ended_s - max(step.at_s, self._last_end_s)
                self._times.observe(step.n_tokens, elapsed_s, ended_s - asked_s)
                self._last_end_s = ended_s
                draws, events = self.scheduler.commit(result, time.monotonic())
                self._emit(events, draws)
        self.step_started_s = None

    def _take_messages(self, wait_s: float | None) -> None:
        """Handle every waiting message; block for the first at most `wait_s`, not at all when None."""
        try:
            client, message = self.inbox.get(timeout=wait_s) if wait_s else self.inbox.get_nowait()
            while True:
                self._handle(client, message)
                client, message = self.inbox.get_nowait()
        except queue.Empty:
            return

    def _await_messages(self) -> None:
        """Handle what comes while the next step need not be planned."""
        if len(self._in_flight) != 1:
            return
        (step,) = self._in_flight
        until_s = max(step.at_s, self._last_end_s) + self._times.spare_s(step.n_tokens)
        while (wait_s := until_s - time.monotonic()) > 0:
            try:
                self._handle(*self.inbox.get(timeout=wait_s))
            except queue.Empty:
                return

    def _handle(self, client: int, message: wire.ToEngine | Disconnect) -> None:
        now_s = time.monotonic()
        match message:
            case wire.Submit():
                self._submit(client, message, now_s)
            case wire.Abort(key=key, is_complete=is_complete):
                event = self.scheduler.abort((client, key), now_s, is_complete=is_complete)
                self._emit([] if event is None else [event])
            case Disconnect():
                self.scheduler.abort_client(client, now_s)
            case wire.Drain(deadline_s=deadline_s):
                self.scheduler.drain()
                self._drain_until_s = now_s + deadline_s
            case wire.StatsQuery(nonce=nonce):
                self._send(client, wire.StatsReply(nonce, self.stats()))
            case wire.Report(name=name, counters=counters):
                self.scheduler.stats.clients[name] = counters

    def stats(self) -> EngineStats:
        """Return the live figures."""
        stats = self.scheduler.snapshot()
        stats.reserved_bytes = self._reserved_bytes()
        return stats

    def _submit(self, client: int, message: wire.Submit, now_s: float) -> None:
        sequence = Sequence(
            key=(client, message.key),
            prompt_ids=message.prompt_ids,
            sampling=message.sampling,
            max_tokens=message.max_tokens,
            priority=message.priority,
            arrival_s=now_s,
            deadline_s=None if message.deadline_s is None else now_s + message.deadline_s,
            tenant=message.tenant,
        )
        try:
            self.scheduler.submit(sequence, now_s)
        except SailfishError as error:
            self._send(
                client,
                wire.Refused(message.key, error.code, error.message, error.param, error.retry_after_s),
            )
        else:
            self._send(client, wire.Accepted(message.key))

    def _fail(self, step_id: int, error: Exception) -> None:
        log.error("step %d failed", step_id, exc_info=error)
        now_s = time.monotonic()
        self._emit(self.scheduler.fail(step_id, "step_failed", "the engine failed in a step", now_s))
        self._n_failed += 1
        if self._n_failed >= _MAX_FAILED_STEPS:
            self._emit(self.scheduler.abort_all(now_s))
            raise EngineError(f"{self._n_failed} steps failed one after the other") from error

    def _emit(self, events: list[SequenceEvent], draws: Draws | None = None) -> None:
        """Tell every client its sequences' news, in one message unless prompts were scored."""
        plain = {} if draws is None else _by_client(draws)
        news: dict[int, list[wire.Event]] = {}
        for event in events:
            client, key = event.key
            told = wire.Event(
                key=key,
                token_ids=event.token_ids,
                logprobs=event.logprobs,
                prompt_logprobs=event.prompt_logprobs,
                n_cached=event.n_cached,
                finish=event.finish,
            )
            if told.prompt_logprobs is None:
                news.setdefault(client, []).append(told)
            else:  # alone: it may fill half a frame
                self._send(client, wire.Events([told]))
        for client in plain | news:
            keys, token_ids = plain.get(client, ([], []))
            self._send(client, wire.Events(news.get(client, []), keys, token_ids))


def _by_client(draws: Draws) -> dict[int, tuple[list[int], list[int]]]:
    """Return each client's own keys and their tokens."""
    if not draws.keys:
        return {}
    clients, keys = zip(*draws.keys, strict=True)
    if clients.count(clients[0]) == len(clients):  # most often: saves a tenth of a microsecond a token
        return {clients[0]: (list(keys), draws.token_ids)}
    return _parted(draws)


def _parted(draws: Draws) -> dict[int, tuple[list[int], list[int]]]:
    found: dict[int, tuple[list[int], list[int]]] = {}
    for (client, key), token_id in zip(draws.keys, draws.token_ids, strict=True):
        own_keys, token_ids = found.setdefault(client, ([], []))
        own_keys.append(key)
        token_ids.append(token_id)
    return found
