"""A runner that models the device: its table, every KV slot, and tokens that depend on the whole prefix.

The content of a KV slot is a hash of the token prefix it was computed from, chained through the content of
the slot before it as a real attention is. A stale block, a lost write or a wrong position therefore changes
the tokens, and is caught where it is read as well.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from sailfish.base.errors import SailfishError
from sailfish.engine.api import TokenLogprob
from sailfish.engine.limits import SchedulerLimits
from sailfish.engine.scheduler import Scheduler
from sailfish.engine.sequence import Sequence, SequenceEvent, SequenceKey
from sailfish.engine.step import (
    RowRun,
    RowSampling,
    RowStart,
    StepPlan,
    StepResult,
    decode_plan,
    decode_result,
    encode,
)

VOCAB = 11
BAD = -1
"""What a slot holds when it was computed from garbage: NaN, as it were."""


def sampling(
    *,
    tenant: int = 0,
    stop_token_ids: tuple[int, ...] = (),
    min_tokens: int = 0,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> RowSampling:
    """Return greedy-like parameters; the tenant is the seed, so that its KV differs from any other's."""
    return RowSampling(
        temperature=0.0,
        top_k=VOCAB,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        seed=tenant,
        min_tokens=min_tokens,
        stop_token_ids=stop_token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def chain(before: int, token_id: int) -> int:
    """Return the content of the slot after one with content `before`."""
    return BAD if before == BAD else hash((before, token_id)) & 0x7FFFFFFFFFFF


def draw(content: int, n_output: int, params: RowSampling) -> int:
    """Return the token that follows a prefix, which is no stop token before `min_tokens`."""
    token_id = content % VOCAB
    while n_output < params.min_tokens and token_id in params.stop_token_ids:
        token_id = (token_id + 1) % VOCAB
    return token_id


def score(content: int, token_id: int) -> TokenLogprob:
    """Return what the runner reports of a token after a prefix."""
    return TokenLogprob(token_id, -float(content % 1000), [])


def alone(prompt: list[int], params: RowSampling, max_tokens: int) -> tuple[list[int], str]:
    """Return the tokens and the end of a sequence as they are without any batching, cache or blocks."""
    content = params.seed
    for token_id in prompt:
        content = chain(content, token_id)
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        tokens.append(draw(content, len(tokens), params))
        if tokens[-1] in params.stop_token_ids and len(tokens) > params.min_tokens:
            return tokens, "stop"
        content = chain(content, tokens[-1])
    return tokens, "length"


@dataclass
class _Row:
    tokens: list[int]
    block_ids: list[int]
    n_prompt: int
    sampling: RowSampling


class StepFault(Exception):
    """A step that raised."""


class FakeRunner:
    """Executes plans at once, as a device does in order; results are handed out later."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.n_tokens = 0
        self._rows: list[_Row | None] = [None] * limits.max_sequences
        self._slots: dict[tuple[int, int], int] = {}

    def execute(
        self, plan: StepPlan, *, fails: bool = False, bad_rows: frozenset[int] = frozenset()
    ) -> bytes:
        """Apply a plan and return the encoded result; `bad_rows` compute garbage where they sample."""
        data = encode(plan)
        assert decode_plan(data) == plan
        plan = decode_plan(data)
        self._check(plan)
        for start in plan.starts:
            self._start(start)
        for row, index, block_id in plan.appended:
            held = self._row(row).block_ids
            assert index == len(held), "blocks are appended in order"
            held.append(block_id)
        token_ids, finite, logprobs, prompt_logprobs = [], [], [], []
        for run in plan.runs:
            is_bad = fails or (run.samples and run.row in bad_rows)
            content, scores = self._compute(run, is_bad)
            prompt_logprobs.append(scores)
            assert not scores or run in plan.spans, "a decode predicts no token of its prompt"
            if run.samples:
                params = self._row(run.row).sampling
                token_id = self._sample(run, content)
                token_ids.append(token_id)
                finite.append(content != BAD)
                logprobs.append(None if params.logprobs is None else score(content, token_id))
        if fails:
            raise StepFault(f"step {plan.step_id}")
        scored = prompt_logprobs[plan.n_decodes :]
        result = StepResult(plan.step_id, token_ids, finite, logprobs, scored)
        assert decode_result(encode(result)) == result
        return encode(result)

    def _check(self, plan: StepPlan) -> None:
        running = [run.row for run in plan.runs]
        assert plan.runs, "a step runs something"
        assert len(set(running)) == len(running), "a row runs once a step"
        assert plan.n_tokens <= self.limits.step_tokens, "the token budget is exceeded"
        changed = {start.row for start in plan.starts} | {row for row, _, _ in plan.appended}
        assert changed <= set(running), "only rows that run are written"
        self.n_tokens += plan.n_tokens

    def _start(self, start: RowStart) -> None:
        old = self._rows[start.row]
        stale = old.tokens if old is not None else [0] * (self.limits.context_tokens + 1)
        tokens = start.token_ids + stale[len(start.token_ids) :]  # the table is not cleared
        self._rows[start.row] = _Row(tokens, list(start.block_ids), start.n_prompt, start.sampling)

    def _row(self, row: int) -> _Row:
        found = self._rows[row]
        assert found is not None, f"row {row} was never started"
        return found

    def _compute(self, run: RowRun, is_bad: bool) -> tuple[int, list[TokenLogprob]]:
        """Write the slots of a run; return the last one's content, and the prompt's scores."""
        row, page = self._row(run.row), self.limits.page_tokens
        content = truth = row.sampling.seed
        for position in range(run.start):
            content = self._slots[row.block_ids[position // page], position % page]
            truth = chain(truth, row.tokens[position])
            assert content in (truth, BAD), f"row {run.row} reads a wrong KV at position {position}"
        scores = []
        for position in range(run.start, run.start + run.count):
            content = BAD if is_bad else chain(content, row.tokens[position])
            self._slots[row.block_ids[position // page], position % page] = content
            if row.sampling.prompt_logprobs is not None and position + 1 < row.n_prompt:
                scores.append(score(content, row.tokens[position + 1]))
        return content, scores

    def _sample(self, run: RowRun, content: int) -> int:
        row, length = self._row(run.row), run.start + run.count
        row.tokens[length] = token_id = draw(content, length - row.n_prompt, row.sampling)
        return token_id


class Launched:
    """What the loop holds of a step that was executed."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def wait(self) -> None:
        """Return at once: the step has run."""

    def result(self) -> StepResult:
        """Return what came of it."""
        return decode_result(self._data)


class LoopRunner:
    """The fake device as the engine's loop drives it, and what it was given."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._fake = FakeRunner(limits)
        self.plans: list[StepPlan] = []

    def execute(self, plan: StepPlan) -> Launched:
        """Run a plan at once."""
        self.plans.append(plan)
        return Launched(self._fake.execute(plan))


@dataclass
class Answer:
    """What the owner of one sequence saw."""

    sequence: Sequence
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None
    reason: str | None = None
    code: str = ""
    stop_token: int | None = None
    n_steps: int = 0
    """Steps since it was submitted until it ended."""


class Rig:
    """A scheduler and a fake runner, driven as the engine's loop drives them, checked at every step."""

    def __init__(self, limits: SchedulerLimits, *, step_s: float = 1.0) -> None:
        self.scheduler = Scheduler(limits, engine_digest="digest", kv_dtype="float32")
        self.runner = FakeRunner(limits)
        self.answers: dict[SequenceKey, Answer] = {}
        self.refused: dict[SequenceKey, SailfishError] = {}
        self.hurt: set[SequenceKey] = set()
        """Sequences that were in a step which a test made fail."""
        self.now_s = 1.0
        self.plans: list[StepPlan] = []
        self._step_s = step_s
        self._in_flight: deque[tuple[int, bytes | None]] = deque()

    def submit(self, prompt: list[int], *, key: SequenceKey | None = None, **fields: object) -> SequenceKey:
        """Submit a sequence; a refusal is kept in `refused`."""
        key = key or (0, len(self.answers) + len(self.refused))
        given = {"sampling": sampling(), "max_tokens": 4, "arrival_s": self.now_s} | fields
        sequence = Sequence(key=key, prompt_ids=prompt, **given)  # type: ignore[arg-type]
        try:
            self.scheduler.submit(sequence, self.now_s)
        except SailfishError as error:
            self.refused[key] = error
        else:
            self.answers[key] = Answer(sequence, prompt)
        return key

    def abort(self, key: SequenceKey) -> None:
        """Abort a sequence, which may have ended."""
        event = self.scheduler.abort(key, self.now_s)
        self.take([] if event is None else [event])

    def step(self, *, fault: str = "") -> None:
        """Plan, run and commit once; `fault` is "launch", "result", "nan" or nothing."""
        for answer in self.answers.values():
            answer.n_steps += answer.reason is None
        plan, events = self.scheduler.schedule(self.now_s)
        self.take(events)
        if plan is not None and plan.n_decodes:
            most = self.scheduler.limits.prompt_tokens_beside(plan.n_decodes)
            assert plan.n_tokens - plan.n_decodes <= most, "decodes wait for more than they are to"
        if plan is None:
            assert self._in_flight or self.scheduler.is_idle, "sequences live and nothing runs"
        else:
            self._launch(plan, fault)
        self.check()
        self.now_s += self._step_s
        if self._in_flight and (plan is None or len(self._in_flight) > self.scheduler.limits.lag):
            step_id, data = self._in_flight.popleft()
            if data is None:
                self.take(self.scheduler.fail(step_id, "step_failed", "it failed", self.now_s))
            else:
                draws, events = self.scheduler.commit(decode_result(data), self.now_s)
                assert not set(draws.keys) & {event.key for event in events}, "each is told of once"
                for key, token_id in zip(draws.keys, draws.token_ids, strict=True):
                    assert self.answers[key].tokens, "all news of the first token is told"
                    self.take([SequenceEvent(key, [token_id])])
                self.take(events)
        self.check()

    def run(self, n_steps: int = 1000) -> None:
        """Step until everything has ended, at most `n_steps` times."""
        for _ in range(n_steps):
            if self.scheduler.is_idle and not self._in_flight:
                return
            self.step()
        raise AssertionError(f"sequences still live after {n_steps} steps")

    def take(self, events: list[SequenceEvent]) -> None:
        """Hand events to their owners."""
        for event in events:
            answer = self.answers[event.key]
            assert answer.reason is None, "an event after the last one"
            if event.prompt_logprobs is not None:
                assert answer.prompt_logprobs is None and not answer.tokens, "prompt scores come once, first"
                answer.prompt_logprobs = event.prompt_logprobs
            answer.tokens += event.token_ids
            answer.logprobs += event.logprobs or []
            if event.finish is not None:
                answer.reason, answer.code = event.finish.reason, event.finish.code
                answer.stop_token = event.finish.stop_token

    def check(self) -> None:
        """Assert what holds between any two calls."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        running = scheduler._running
        rows = [s.row for s in running]
        assert len(set(rows)) == len(rows) and None not in rows, "live sequences share a row"
        assert sorted(rows + scheduler._free_rows) == list(range(scheduler.limits.max_sequences))
        held = [block_id for s in running for block_id in s.block_ids]
        for block_id in range(pool.n_blocks):
            assert pool.n_refs(block_id) == held.count(block_id), f"block {block_id} is leaked"
        assert pool.n_used == len(set(held))
        assert [s.order for s in running] == sorted(s.order for s in running)
        waiting = scheduler._waiting
        assert [s.order for s in waiting] == sorted(s.order for s in waiting)
        assert scheduler._waiting_tokens == sum(s.n_wanted for s in waiting)
        assert all(not s.block_ids and s.row is None for s in waiting)
        live = {key for key, answer in self.answers.items() if answer.reason is None}
        assert {s.key for s in running + waiting} == live, "a sequence is lost"
        for sequence in running:
            assert sequence.n_wanted <= sequence.limit_tokens <= scheduler.limits.context_tokens
            assert sequence.n_computed < sequence.n_wanted
            assert sequence.n_pending <= (1 if sequence.needs_host else 1 + scheduler.limits.lag)

    def check_answer(self, answer: Answer) -> None:
        """Assert that a sequence got what it would have got alone, or the beginning of it."""
        sequence, params = answer.sequence, answer.sequence.sampling
        expected, reason = alone(answer.prompt, params, sequence.limit_tokens - sequence.n_prompt)
        if answer.reason in ("stop", "length"):
            assert (answer.tokens, answer.reason) == (expected, reason)
            assert answer.stop_token == (expected[-1] if reason == "stop" else None)
        else:
            assert answer.tokens == expected[: len(answer.tokens)]
        if params.logprobs is not None:
            assert [p.token_id for p in answer.logprobs] == answer.tokens
        if params.prompt_logprobs is not None and answer.tokens:
            content, scores = params.seed, []
            for token_id, following in zip(answer.prompt, answer.prompt[1:], strict=False):
                content = chain(content, token_id)
                scores.append(score(content, following))
            assert answer.prompt_logprobs == scores

    def _launch(self, plan: StepPlan, fault: str) -> None:
        self.plans.append(plan)
        sequences = self.scheduler._in_flight[plan.step_id].sequences
        if fault == "nan":
            sampling_rows = {run.row for run in plan.runs if run.samples}
            bad_rows = frozenset(sorted(sampling_rows)[:1])
            self.hurt |= {s.key for s in sequences if s.row in bad_rows}
            self._in_flight.append((plan.step_id, self.runner.execute(plan, bad_rows=bad_rows)))
            return
        try:
            data = self.runner.execute(plan, fails=fault in ("launch", "result"))
        except StepFault:
            self.hurt |= {s.key for s in sequences}
            if fault == "result":
                self._in_flight.append((plan.step_id, None))
            else:
                self.take(self.scheduler.fail(plan.step_id, "step_failed", "it failed", self.now_s))
        else:
            self._in_flight.append((plan.step_id, data))
