"""Plans each step as arithmetic on plain integers, and turns each step's tokens into events.

A sequence wants `n_wanted` tokens computed and has `n_computed`; a run closes some of the gap, and the run
that closes it draws the next token, which makes the gap one again. Chunked prefill, prefix hits, decode and
the recompute after a preemption differ only in the size of the gap.

Results come late: a step may be planned before the tokens of the one before it are known. Whatever voids a
sequence's planned work (its end, a preemption) raises its epoch, and results of older epochs are ignored.
Steps run in the order they are planned, so a block or row may be given away while a voided step uses it.
Every row and block written by a plan belongs to a sequence that the same plan runs: when a step fails, no
other sequence has lost anything.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from math import inf

from sailfish.base.errors import (
    DeadlineExceeded,
    RequestAborted,
    RequestError,
    SailfishError,
)
from sailfish.engine.admission import Admission
from sailfish.engine.api import EngineStats, TokenLogprob
from sailfish.engine.kv.blocks import BlockPool
from sailfish.engine.kv.holdings import Holdings
from sailfish.engine.ledger import Ledger
from sailfish.engine.limits import SchedulerLimits
from sailfish.engine.sequence import Sequence, SequenceEvent, SequenceKey
from sailfish.engine.step import RowRun, RowStart, StepPlan, StepResult
from sailfish.engine.wire import Finish

_MAX_PASSED = 16  # waiting sequences that a step examines in vain, which bounds its cost


@dataclass(slots=True, kw_only=True)
class _Step:
    """A step in flight: each run's sequence, and the epoch in which it was planned."""

    plan: StepPlan
    sequences: list[Sequence]
    epochs: list[int]
    planned_s: float
    n_tokens: int = 0


class Scheduler:
    """Decides what every step computes. Single-threaded; times are seconds of one monotonic clock."""

    def __init__(self, limits: SchedulerLimits, *, engine_digest: str, kv_dtype: str) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.n_blocks, limits.page_tokens)
        self._holdings = Holdings(
            self.pool, engine_digest=engine_digest, kv_dtype=kv_dtype, prefix_cache=limits.prefix_cache
        )
        self._admission = Admission(context_tokens=limits.context_tokens, max_queue=limits.max_queue)
        self._ledger = Ledger(limits.n_blocks)
        self._live: dict[SequenceKey, Sequence] = {}
        self._waiting: list[Sequence] = []  # ascending order, as is _running
        self._running: list[Sequence] = []
        self._waiting_tokens = 0
        self._free_rows = list(range(limits.max_sequences - 1, -1, -1))
        self._in_flight: dict[int, _Step] = {}
        self._n_submitted = 0
        self._n_planned = 0
        self._next_deadline_s = inf  # no live sequence expires before this
        self._last_commit_s = 0.0

    @property
    def stats(self) -> EngineStats:
        """The engine's counters; `snapshot` brings the gauges among them up to date."""
        return self._ledger.stats

    @property
    def is_idle(self) -> bool:
        """Whether no sequence is waiting or running."""
        return not self._live

    @property
    def n_running(self) -> int:
        """Sequences that hold a row."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        """Sequences accepted that hold no row."""
        return len(self._waiting)

    def snapshot(self) -> EngineStats:
        """Return the live figures; the gauges are brought up to date."""
        stats = self.stats
        stats.running, stats.waiting = len(self._running), len(self._waiting)
        stats.blocks_used, stats.blocks_cached = self.pool.n_used, self.pool.n_cached
        stats.draining = self._admission.is_draining
        return stats

    def drain(self) -> None:
        """Refuse new sequences from now on; accepted ones go on."""
        self._admission.is_draining = True

    def submit(self, sequence: Sequence, now_s: float) -> None:
        """Put a sequence in the queue: from then on it gets exactly one finish.

        Raises RequestError or ContextTooLong when it can never run, Overloaded when not now.
        """
        try:
            if sequence.key in self._live:
                raise RequestError(f"sequence {sequence.key} is already running; choose another key")
            self._admission.check(
                sequence,
                n_waiting=max(0, len(self._waiting) - len(self._free_rows)),  # the rest starts at once
                backlog_tokens=self._waiting_tokens + sum(s.n_left for s in self._running),
                now_s=now_s,
            )
        except SailfishError as error:
            self._ledger.refuse(error.code)
            raise
        self._n_submitted += 1
        sequence.accept(self._n_submitted, self.limits.context_tokens)
        self._live[sequence.key] = sequence
        self._enqueue(sequence)
        if sequence.deadline_s is not None:
            self._next_deadline_s = min(self._next_deadline_s, sequence.deadline_s)

    def abort(self, key: SequenceKey, now_s: float, *, is_complete: bool = False) -> SequenceEvent | None:
        """End a sequence because its answer is complete or unwanted; None if it has ended already."""
        sequence = self._live.get(key)
        return None if sequence is None else self._end(sequence, _STOPPED if is_complete else _ABORTED, now_s)

    def abort_client(self, client: int, now_s: float) -> list[SequenceEvent]:
        """End all sequences of a client that is gone."""
        keys = [key for key in self._live if key[0] == client]
        return [self._end(self._live[key], _ABORTED, now_s) for key in keys]

    def abort_all(self, now_s: float) -> list[SequenceEvent]:
        """End every sequence because the engine stops."""
        return [self._end(sequence, _STOPPING, now_s) for sequence in list(self._live.values())]

    def schedule(self, now_s: float) -> tuple[StepPlan | None, list[SequenceEvent]]:
        """Plan the next step, None when nothing can run; the events are of expired sequences."""
        assert len(self._in_flight) <= self.limits.lag, "a step is planned before the last one is committed"
        events = self._expire(now_s) if now_s >= self._next_deadline_s else []
        plan = StepPlan(step_id=self._n_planned, starts=[], appended=[], runs=[])
        step = _Step(plan=plan, sequences=[], epochs=[], planned_s=now_s)
        budget, prefills = self._plan_decodes(step)
        if budget > 0:
            self._plan_prefills(step, prefills, budget, now_s)
        if not plan.runs:
            return None, events
        step.n_tokens = plan.n_tokens
        self._n_planned += 1
        self._in_flight[plan.step_id] = step
        self._ledger.plan(step.n_tokens)
        return plan, events

    def commit(self, result: StepResult, now_s: float) -> list[SequenceEvent]:
        """Take a step's tokens: one event for each sequence that got one and still lives."""
        step = self._in_flight.pop(result.step_id)
        runs = step.plan.runs
        elapsed_s = now_s - max(step.planned_s, self._last_commit_s)
        self._admission.forecast.observe(step.n_tokens, len(runs), elapsed_s)
        self._last_commit_s = now_s
        page_tokens = self.limits.page_tokens
        events: list[SequenceEvent] = []
        drawn: list[Sequence] = []
        token_ids: list[int] = []
        logprobs: list[TokenLogprob | None] = []
        at = 0  # in the result's arrays, which know only the runs that sample
        for i, (run, sequence, epoch) in enumerate(zip(runs, step.sequences, step.epochs, strict=True)):
            sample, at = at, at + run.samples
            if sequence.epoch != epoch:
                continue
            if run.samples and not result.finite[sample]:
                events.append(self._end_not_finite(sequence, now_s))
                continue
            n_full = (run.start + run.count) // page_tokens
            if n_full > sequence.n_indexed:
                self._holdings.index(sequence, n_full)
            if sequence.prompt_scores is not None:
                sequence.prompt_scores += result.prompt_logprobs[i]
            if run.samples:
                drawn.append(sequence)
                token_ids.append(result.token_ids[sample])
                logprobs.append(result.logprobs[sample])
        self._ledger.draw(drawn, now_s)
        for sequence, token_id, logprob in zip(drawn, token_ids, logprobs, strict=True):
            events.append(self._deliver(sequence, token_id, logprob, now_s))
        return events

    def fail(self, step_id: int, code: str, message: str, now_s: float) -> list[SequenceEvent]:
        """End the sequences of a step that raised. The others live on."""
        step = self._in_flight.pop(step_id)
        self.stats.step_errors += 1
        finish = Finish("error", code=code, message=message)
        pairs = zip(step.sequences, step.epochs, strict=True)
        return [self._end(s, finish, now_s) for s, epoch in pairs if s.epoch == epoch]

    # Planning.

    def _plan_decodes(self, step: _Step) -> tuple[int, list[Sequence]]:
        """Run every sequence that is one position behind; return the budget left and the other ones."""
        plan, page_tokens = step.plan, self.limits.page_tokens
        runs, sequences, epochs = plan.runs, step.sequences, step.epochs
        budget = self.limits.step_tokens
        prefills: list[Sequence] = []
        for sequence in self._running:  # a preemption removes from the end only, never a planned one
            start = sequence.n_computed
            n_wanted = sequence.n_wanted
            if n_wanted - start > 1:
                prefills.append(sequence)
                continue
            if n_wanted >= sequence.limit_tokens or budget == 0:
                continue
            if sequence.needs_host and sequence.n_pending:
                continue
            if start == len(sequence.block_ids) * page_tokens and not self._grow(sequence, plan):
                continue
            runs.append(RowRun(sequence.row, start, 1, True))  # type: ignore[arg-type]
            sequences.append(sequence)
            epochs.append(sequence.epoch)
            sequence.n_computed = start + 1
            sequence.n_wanted = n_wanted + 1
            budget -= 1
        return budget, prefills

    def _plan_prefills(self, step: _Step, prefills: list[Sequence], budget: int, now_s: float) -> None:
        """Share what the decodes left: half to the first in order, the rest to the shortest.

        The half lets the first one advance whatever arrives after it; the rest lets short prompts pass long
        ones, and comes back to the first when nobody shorter wants it. A waiting sequence is admitted only
        when it computes something at once, so that it finds the prefixes which others finish before it.
        """
        half = (budget + 1) // 2
        n_candidates = min(len(self._free_rows), budget) + _MAX_PASSED
        candidates = self._waiting[:n_candidates] if self._free_rows else []
        first = min(prefills[:1] + candidates[:1], key=_order, default=None)
        counts = dict.fromkeys(prefills, 0)
        if first in counts:
            counts[first] = min(first.n_left, half)
            budget -= counts[first]
        owed = [s.n_left - n for s, n in counts.items()]
        n_passed = 0
        for sequence in candidates:
            if budget == 0 or not self._free_rows or n_passed == _MAX_PASSED:
                break
            matched = self._holdings.match(sequence)
            n_new = sequence.n_wanted - len(matched) * self.limits.page_tokens
            if sequence is first:
                count = min(n_new, half)
            else:
                count = min(n_new, budget - sum(n for n in owed if n <= n_new))
            if count <= 0:
                n_passed += 1
                continue
            if not self._admit(sequence, matched, step.plan, now_s):
                break
            counts[sequence] = count
            budget -= count
            if count < n_new:
                owed.append(n_new - count)
        for sequence in sorted(counts, key=lambda s: s.n_left - counts[s]):
            extra = min(sequence.n_left - counts[sequence], budget)
            counts[sequence] += extra
            budget -= extra
        for sequence, count in counts.items():
            if count:
                self._run(sequence, count, step)

    def _run(self, sequence: Sequence, count: int, step: _Step) -> None:
        assert sequence.row is not None
        samples = count == sequence.n_left
        step.plan.runs.append(RowRun(sequence.row, sequence.n_computed, count, samples))
        step.sequences.append(sequence)
        step.epochs.append(sequence.epoch)
        sequence.n_computed += count
        sequence.n_wanted += samples

    def _grow(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Give a running sequence one more block; False if it was preempted itself.

        Preempts the last in order while there is none. The first in order therefore always advances, since
        the pool holds at least one full context.
        """
        while not self._holdings.grow(sequence):
            victim = self._running.pop()
            self.stats.preemptions += 1
            self._take_back(victim)
            self._enqueue(victim)
            if victim is sequence:
                return False
        assert sequence.row is not None
        plan.appended.append((sequence.row, len(sequence.block_ids) - 1, sequence.block_ids[-1]))
        return True

    def _admit(self, sequence: Sequence, matched: list[int], plan: StepPlan, now_s: float) -> bool:
        """Give a waiting sequence a row and the blocks of all its known tokens, if there are enough."""
        reserve_blocks = self.limits.watermark_blocks if self._running else 0
        if not self._holdings.take(sequence, matched, reserve_blocks):
            return False
        self._dequeue(sequence)
        insort(self._running, sequence, key=_order)
        sequence.row = self._free_rows.pop()
        token_ids, block_ids = list(sequence.token_ids), list(sequence.block_ids)
        plan.starts.append(RowStart(sequence.row, token_ids, sequence.n_prompt, block_ids, sequence.sampling))
        self._ledger.start(sequence, now_s, prefix_cache=self.limits.prefix_cache)
        return True

    # Ends and results.

    def _deliver(
        self, sequence: Sequence, token_id: int, logprob: TokenLogprob | None, now_s: float
    ) -> SequenceEvent:
        """Append a drawn token to its sequence and tell, ending the sequence if it is the last one."""
        known = sequence.token_ids
        known.append(token_id)
        prompt_logprobs = sequence.prompt_scores
        sequence.prompt_scores = None
        finish = None
        if token_id in sequence.stop_ids and sequence.n_output > sequence.sampling.min_tokens:
            finish = Finish("stop", stop_token=token_id)
        elif len(known) == sequence.limit_tokens:
            finish = _LENGTH
        if finish is not None:
            self._close(sequence, finish, now_s)
        logprobs = None if logprob is None else [logprob]
        return SequenceEvent(sequence.key, [token_id], logprobs, prompt_logprobs, sequence.n_cached, finish)

    def _end_not_finite(self, sequence: Sequence, now_s: float) -> SequenceEvent:
        """End a sequence whose logits were not finite; its KV may be bad, so nobody else may find it."""
        self._holdings.distrust(sequence)
        message = (
            f"the model's logits were not finite after {len(sequence.token_ids)} tokens; "
            "run the engine in float32 or check the checkpoint"
        )
        return self._end(sequence, Finish("error", code="nan_logits", message=message), now_s)

    def _expire(self, now_s: float) -> list[SequenceEvent]:
        """End the sequences whose deadline has passed."""
        limited = [(s.deadline_s, s) for s in self._live.values() if s.deadline_s is not None]
        self._next_deadline_s = min((at_s for at_s, _ in limited if at_s > now_s), default=inf)
        return [self._end(sequence, _EXPIRED, now_s) for at_s, sequence in limited if at_s <= now_s]

    def _end(self, sequence: Sequence, finish: Finish, now_s: float) -> SequenceEvent:
        self._close(sequence, finish, now_s)
        return SequenceEvent(sequence.key, n_cached=sequence.n_cached, finish=finish)

    def _close(self, sequence: Sequence, finish: Finish, now_s: float) -> None:
        """Take back what a sequence holds and count its end."""
        del self._live[sequence.key]
        if sequence.row is None:
            self._dequeue(sequence)
        else:
            self._running.remove(sequence)
            self._take_back(sequence)
        self._ledger.end(sequence, finish, now_s)

    def _take_back(self, sequence: Sequence) -> None:
        """Free a running sequence's row and blocks, and void what is planned of it."""
        assert sequence.row is not None
        self._free_rows.append(sequence.row)
        self._holdings.give_back(sequence)
        sequence.forget_work()

    def _enqueue(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=_order)
        self._waiting_tokens += len(sequence.token_ids)

    def _dequeue(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self._waiting_tokens -= len(sequence.token_ids)


_LENGTH = Finish("length")
_STOPPED = Finish("stop")
_ABORTED = Finish("abort", code=RequestAborted.code, message="the client ended the request")
_STOPPING = Finish("abort", code=RequestAborted.code, message="the engine is stopping; send it again")
_EXPIRED = Finish("deadline", code=DeadlineExceeded.code, message="the request's deadline passed")


def _order(sequence: Sequence) -> tuple[float, int]:
    return sequence.order
