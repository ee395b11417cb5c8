"""Plans each step as arithmetic on plain integers, and turns each step's tokens into events.

A sequence wants `n_wanted` tokens computed and has `n_computed`; a run closes some of the gap, and the run
that closes it draws the next token, which makes the gap one again. Chunked prefill, prefix hits, decode and
the recompute after a preemption differ only in the size of the gap.

Results come late: a step may be planned before the tokens of the one before it are known. Whatever voids a
sequence's planned work (its end, a preemption) is noted in the steps in flight, so that their results of it
are ignored.
Steps run in the order they are planned, so a block or row may be given away while a voided step uses it.
Every row and block written by a plan belongs to a sequence that the same plan runs: when a step fails, no
other sequence has lost anything.
"""

from __future__ import annotations

from bisect import insort
from math import inf

from sailfish.base.errors import DeadlineExceeded, RequestAborted, RequestError, SailfishError
from sailfish.engine.admission import Admission
from sailfish.engine.api import EngineStats, TokenLogprob
from sailfish.engine.flight import Flight
from sailfish.engine.kv.blocks import BlockPool
from sailfish.engine.kv.holdings import Holdings
from sailfish.engine.ledger import Ledger
from sailfish.engine.limits import SchedulerLimits
from sailfish.engine.sequence import Draws, Sequence, SequenceEvent, SequenceKey
from sailfish.engine.step import RowStart, StepPlan, StepResult
from sailfish.engine.wire import Finish

_MAX_PASSED = 16  # waiting sequences that a step examines in vain, which bounds its cost


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
        self._in_flight: dict[int, Flight] = {}
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
        step = Flight(planned_s=now_s)
        budget, prefills = self._plan_decodes(step)
        if step.decodes:
            budget = min(budget, self.limits.prompt_tokens_beside(len(step.decodes)))
        if budget > 0:
            self._plan_prefills(step, prefills, budget, now_s)
        if not step.decodes and not step.spans:
            return None, events
        plan = step.plan(self._n_planned)
        step.n_tokens = plan.n_tokens
        self._n_planned += 1
        self._in_flight[plan.step_id] = step
        self._ledger.plan(step.n_tokens)
        return plan, events

    def commit(self, result: StepResult, now_s: float) -> tuple[Draws, list[SequenceEvent]]:
        """Take a step's tokens: a draw or an event of each sequence that got one and still lives."""
        step = self._in_flight.pop(result.step_id)
        elapsed_s = now_s - max(step.planned_s, self._last_commit_s)
        self._admission.forecast.observe(step.n_tokens, step.n_runs, elapsed_s)
        self._last_commit_s = now_s
        events: list[SequenceEvent] = []
        sequences, token_ids = step.decodes, result.token_ids[: len(step.decodes)]
        told: dict[Sequence, TokenLogprob | None] = dict.fromkeys(step.told)
        if step.voided or not all(result.finite) or result.logprobs.count(None) < len(result.logprobs):
            sequences, token_ids, not_finite = step.sift(result, told)
            step.voided.update(not_finite)
            events += [self._end_not_finite(sequence, now_s) for sequence in not_finite]
        for sequence in step.filled:
            if sequence not in step.voided:
                self._holdings.index(sequence, len(sequence.token_ids) // self.limits.page_tokens)
        if step.spanned:
            self._commit_spans(step, result, sequences, token_ids, told, events, now_s)
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            sequence.token_ids.append(token_id)
            if token_id in sequence.stop_ids and sequence not in told:
                told[sequence] = None
        self._ledger.draw(sequences, now_s)
        if not told:
            return Draws([s.key for s in sequences], token_ids), events
        plain = [(s.key, t) for s, t in zip(sequences, token_ids, strict=True) if s not in told]
        events += [self._tell(sequence, logprob, now_s) for sequence, logprob in told.items()]
        return Draws([key for key, _ in plain], [token_id for _, token_id in plain]), events

    def fail(self, step_id: int, code: str, message: str, now_s: float) -> list[SequenceEvent]:
        """End the sequences of a step that raised. The others live on."""
        step = self._in_flight.pop(step_id)
        self.stats.step_errors += 1
        finish = Finish("error", code=code, message=message)
        return [self._end(s, finish, now_s) for s in step.sequences if s not in step.voided]

    # Planning.

    def _plan_decodes(self, step: Flight) -> tuple[int, list[Sequence]]:
        """Run every sequence that is one position behind; return the budget left and the other ones."""
        running, budget = self._running, self.limits.step_tokens
        prefills: list[Sequence] = []
        idle: set[Sequence] = set()
        due = [(i, s) for i, s in enumerate(running) if s.n_computed >= s.quiet_until]
        for i, sequence in due:
            if i - len(idle) >= budget:
                break
            if sequence.row is None:  # preempted for one before it
                continue
            if sequence.n_left > 1:
                prefills.append(sequence)
                idle.add(sequence)
            elif not self._can_decode(sequence, step):
                idle.add(sequence)
        step.decode([sequence for sequence in running if sequence not in idle][:budget])
        return budget - len(step.decodes), prefills

    def _can_decode(self, sequence: Sequence, step: Flight) -> bool:
        """Make a sequence that is one position behind ready to run; False if it must wait.

        Notes what the step's commit has to do besides adding a token, and how long nothing of that comes.
        """
        start = sequence.n_computed
        last = sequence.limit_tokens - 2  # the position whose draw is the last one
        if start > last or (sequence.needs_host and sequence.n_pending):
            return False
        if start == len(sequence.block_ids) * self.limits.page_tokens and not self._grow(sequence, step):
            return False
        block_end = len(sequence.block_ids) * self.limits.page_tokens - 1
        if start == block_end:
            step.filled.append(sequence)
        if start == last or start == sequence.n_prompt - 1:
            step.told.append(sequence)
        sequence.quiet_until = 0 if sequence.needs_host else min(block_end, last)
        return True

    def _plan_prefills(self, step: Flight, prefills: list[Sequence], budget: int, now_s: float) -> None:
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
            if not self._admit(sequence, matched, step, now_s):
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
                step.advance(sequence, count)

    def _grow(self, sequence: Sequence, step: Flight) -> bool:
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
        step.appended.append((sequence.row, len(sequence.block_ids) - 1, sequence.block_ids[-1]))
        return True

    def _admit(self, sequence: Sequence, matched: list[int], step: Flight, now_s: float) -> bool:
        """Give a waiting sequence a row and the blocks of all its known tokens, if there are enough."""
        reserve_blocks = self.limits.watermark_blocks if self._running else 0
        if not self._holdings.take(sequence, matched, reserve_blocks):
            return False
        self._dequeue(sequence)
        insort(self._running, sequence, key=_order)
        sequence.row = self._free_rows.pop()
        token_ids, block_ids = list(sequence.token_ids), list(sequence.block_ids)
        step.starts.append(RowStart(sequence.row, token_ids, sequence.n_prompt, block_ids, sequence.sampling))
        self._ledger.start(sequence, now_s, prefix_cache=self.limits.prefix_cache)
        return True

    # Ends and results.

    def _commit_spans(
        self,
        step: Flight,
        result: StepResult,
        sequences: list[Sequence],
        token_ids: list[int],
        told: dict[Sequence, TokenLogprob | None],
        events: list[SequenceEvent],
        now_s: float,
    ) -> None:
        """Index and score what the step's spans computed; add those that drew to the first three."""
        sample = len(step.decodes) - 1  # in the result's arrays, which know only the runs that sample
        for i, (run, sequence) in enumerate(zip(step.spans, step.spanned, strict=True)):
            sample += run.samples
            if sequence in step.voided:
                continue
            if run.samples and not result.finite[sample]:
                events.append(self._end_not_finite(sequence, now_s))
                continue
            n_full = (run.start + run.count) // self.limits.page_tokens
            if n_full > sequence.n_indexed:
                self._holdings.index(sequence, n_full)
            if sequence.prompt_scores is not None:
                sequence.prompt_scores += result.prompt_logprobs[i]
            if run.samples:
                sequences.append(sequence)
                token_ids.append(result.token_ids[sample])
                told[sequence] = result.logprobs[sample]

    def _tell(self, sequence: Sequence, logprob: TokenLogprob | None, now_s: float) -> SequenceEvent:
        """Return all news that comes with a sequence's newest token, ending it if that is the last one."""
        known = sequence.token_ids
        token_id = known[-1]
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
        for step in self._in_flight.values():
            step.voided.add(sequence)
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
