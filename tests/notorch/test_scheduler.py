"""Who runs when: the budget, the order, chunks, preemption, ends, and results that come late."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_runner import Rig, alone, sampling
from plan_models import PLAN

from sailfish.base.errors import ConfigError, RequestError
from sailfish.engine.limits import SchedulerLimits
from sailfish.engine.sequence import SequenceKey

both_lags = pytest.mark.parametrize("lag", [0, 1])


def limits(**fields: int | bool) -> SchedulerLimits:
    """Return a roomy engine with some fields changed."""
    roomy = {
        "max_sequences": 8,
        "step_tokens": 64,
        "context_tokens": 64,
        "max_queue": 64,
        "page_tokens": 4,
        "n_blocks": 128,
        "lag": 0,
    }
    return SchedulerLimits(**(roomy | fields))  # type: ignore[arg-type]


def check_all(rig: Rig) -> None:
    """Assert that every answer is the one of the sequence alone."""
    for answer in rig.answers.values():
        assert answer.reason in ("stop", "length")
        rig.check_answer(answer)


def prompt_of(n_tokens: int, token_id: int = 1) -> list[int]:
    """Return a prompt that shares nothing with that of another token."""
    return [token_id] * n_tokens


@both_lags
def test_a_prompt_is_computed_in_chunks_of_the_budget(lag: int) -> None:
    """20 tokens at 8 a step are 3 steps; the last of them draws."""
    rig = Rig(limits(step_tokens=8, lag=lag))
    rig.submit(prompt_of(20), max_tokens=1)
    rig.run()
    runs = [plan.runs[0] for plan in rig.plans]
    assert [(run.start, run.count, run.samples) for run in runs] == [
        (0, 8, False),
        (8, 8, False),
        (16, 4, True),
    ]
    check_all(rig)


@both_lags
def test_decodes_go_on_while_a_prompt_is_computed(lag: int) -> None:
    """A running answer gets a token in every step of someone else's prefill."""
    rig = Rig(limits(step_tokens=8, lag=lag))
    key = rig.submit(prompt_of(3), max_tokens=20)
    rig.step()
    rig.submit(prompt_of(40, 2), max_tokens=1)
    for _ in range(6):
        rig.step()
    row = rig.answers[key].sequence.row
    assert all(any(run.row == row for run in plan.runs) for plan in rig.plans)
    rig.run()
    check_all(rig)


@both_lags
def test_a_step_begins_as_many_prompts_as_its_budget_and_rows_hold(lag: int) -> None:
    """40 prompts of 2 tokens at 64 a step: 32 begin at once, the others in the next step."""
    rig = Rig(limits(max_sequences=48, lag=lag))
    for i in range(40):
        rig.submit(prompt_of(2, i % 10), max_tokens=2)
    rig.run()
    assert [len(plan.starts) for plan in rig.plans][:2] == [32, 8]
    check_all(rig)


@both_lags
@pytest.mark.parametrize("n_prompt", [3, 4, 5, 8])
def test_prompts_around_a_block_edge_lose_nothing(lag: int, n_prompt: int) -> None:
    """Blocks of 4: one short of, exactly, and one beyond a multiple."""
    rig = Rig(limits(lag=lag))
    for token_id in range(3):
        rig.submit(prompt_of(n_prompt, token_id), max_tokens=9)
    rig.run()
    check_all(rig)


@both_lags
def test_a_whole_context_can_be_filled(lag: int) -> None:
    """Without max_tokens an answer ends exactly at the context."""
    rig = Rig(limits(context_tokens=30, n_blocks=8, lag=lag))
    key = rig.submit(prompt_of(7), max_tokens=None)
    rig.run()
    assert len(rig.answers[key].tokens) == 23
    check_all(rig)


def test_a_step_is_planned_before_the_last_ones_tokens_are_known() -> None:
    """Lag 1 keeps the device busy: two steps are planned when the first result arrives."""
    rig = Rig(limits(lag=1))
    key = rig.submit(prompt_of(3), max_tokens=5)
    rig.step()
    assert rig.answers[key].tokens == []
    rig.step()
    assert len(rig.plans) == 2 and len(rig.answers[key].tokens) == 1
    rig.run()
    assert len(rig.plans) == 5, "the count is known ahead, so no step is planned in vain"


def test_tokens_drawn_after_a_stop_are_dropped() -> None:
    """At lag 1 the step after the stop token has been planned already; nobody sees its token."""
    tokens, _ = alone(prompt_of(3), sampling(), 12)
    stop = tokens[3]
    params = sampling(stop_token_ids=(stop,))
    rig = Rig(limits(lag=1))
    key = rig.submit(prompt_of(3), max_tokens=12, sampling=params)
    rig.run()
    answer = rig.answers[key]
    assert answer.tokens == tokens[: tokens.index(stop) + 1] and answer.stop_token == stop
    assert len(rig.plans) == len(answer.tokens) + 1
    assert rig.scheduler.stats.generated_tokens == len(answer.tokens)


def test_a_sequence_that_needs_the_host_waits_for_its_token() -> None:
    """It runs in every other step at lag 1, while others run in each."""
    rig = Rig(limits(lag=1))
    slow = rig.submit(prompt_of(3), max_tokens=5, needs_host=True)
    fast = rig.submit(prompt_of(3, 2), max_tokens=9)
    rig.run()
    assert rig.answers[fast].n_steps == rig.answers[slow].n_steps
    check_all(rig)


@both_lags
def test_the_last_in_order_is_preempted_and_gets_the_same_tokens(lag: int) -> None:
    """Two answers grow until the blocks run out; the younger one gives way and is computed again."""
    rig = Rig(limits(context_tokens=32, n_blocks=8, lag=lag))
    first = rig.submit(prompt_of(8), max_tokens=24)
    second = rig.submit(prompt_of(8, 2), max_tokens=24)
    rig.run()
    assert rig.scheduler.stats.preemptions > 0
    assert rig.answers[first].n_steps == 24 + lag < rig.answers[second].n_steps
    assert rig.scheduler.stats.prompt_tokens == 16, "a prompt that is computed again counts once"
    check_all(rig)


@both_lags
def test_all_sequences_growing_beyond_the_pool_end(lag: int) -> None:
    """Eight answers that fit one at a time: each ends, none of them twice."""
    rig = Rig(limits(context_tokens=32, n_blocks=8, lag=lag))
    for token_id in range(8):
        rig.submit(prompt_of(2, token_id), max_tokens=30)
    rig.run()
    check_all(rig)
    assert rig.scheduler.snapshot().finished == {"length": 8}


def test_the_watermark_leaves_blocks_to_those_who_run() -> None:
    """Admission stops before the pool is full, except for the only one."""
    rig = Rig(limits(n_blocks=16, watermark_blocks=4, context_tokens=64))
    rig.submit(prompt_of(36), max_tokens=2)
    rig.submit(prompt_of(12, 2), max_tokens=2)
    rig.submit(prompt_of(12, 3), max_tokens=2)
    rig.step()
    assert (rig.scheduler.n_running, rig.scheduler.n_waiting) == (2, 1)
    rig.run()
    alone_key = rig.submit(prompt_of(60, 4), max_tokens=2)
    rig.run()
    assert rig.answers[alone_key].reason == "length"
    check_all(rig)


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    """Its first token comes while the long prompt, which came first, is computed."""
    rig = Rig(limits(context_tokens=1024, n_blocks=512, step_tokens=16))
    long = rig.submit(prompt_of(800), max_tokens=1)
    rig.step()
    short = rig.submit(prompt_of(4, 2), max_tokens=1)
    rig.step()
    rig.run()
    assert rig.answers[short].n_steps == 1
    assert rig.answers[long].n_steps <= 51 + 1
    check_all(rig)


def test_a_short_prompt_passes_a_long_one_that_waits_too() -> None:
    """The queue's first cannot be helped in this step; that is no reason to leave the second waiting."""
    rig = Rig(limits(context_tokens=1024, n_blocks=512, step_tokens=16))
    rig.submit(prompt_of(300), max_tokens=1)
    rig.step()
    longer = rig.submit(prompt_of(400, 2), max_tokens=1)
    short = rig.submit(prompt_of(4, 3), max_tokens=1)
    rig.step()
    assert rig.answers[short].reason == "length" and rig.answers[longer].sequence.row is None
    rig.run()
    check_all(rig)


def test_a_middling_prompt_passes_a_long_one() -> None:
    """The half of the budget that is not the first one's goes to the shortest."""
    rig = Rig(limits(context_tokens=1024, n_blocks=512, step_tokens=16))
    rig.submit(prompt_of(800), max_tokens=1)
    rig.step()
    middle = rig.submit(prompt_of(40, 2), max_tokens=1)
    rig.run()
    assert rig.answers[middle].n_steps == 5  # 40 tokens at 8 a step
    check_all(rig)


def test_a_long_prompt_is_not_starved_by_short_ones() -> None:
    """Short prompts that could fill every step leave the first in order its half."""
    rig = Rig(limits(context_tokens=1024, n_blocks=512, step_tokens=16))
    long = rig.submit(prompt_of(160), max_tokens=1)
    for step in range(20):
        for i in range(3):
            rig.submit([2 + i, step % 11, *prompt_of(6, i)], max_tokens=1)
        rig.step()
    assert rig.answers[long].n_steps <= 20
    assert rig.answers[long].reason == "length"
    rig.run()
    check_all(rig)


def test_no_budget_is_left_while_someone_could_use_it() -> None:
    """Every step of a backlog of prompts is full."""
    rig = Rig(limits(step_tokens=16, prefix_cache=False))
    for token_id in range(8):
        rig.submit(prompt_of(20 + token_id, token_id), max_tokens=1)
    rig.run()
    assert all(plan.n_tokens == 16 for plan in rig.plans[:-1])


@both_lags
def test_a_step_in_which_others_decode_takes_few_tokens_of_prompts(lag: int) -> None:
    """An answer waits for mixed_tokens at most; nobody waits while no answer is written."""
    rig = Rig(limits(context_tokens=1024, n_blocks=512, step_tokens=64, mixed_tokens=16, lag=lag))
    rig.submit(prompt_of(100), max_tokens=30)
    rig.step()
    rig.step()
    rig.submit(prompt_of(120, 2), max_tokens=30)
    rig.run()
    assert [run.count for plan in rig.plans[:2] for run in plan.spans] == [64, 36]
    beside = [plan for plan in rig.plans if plan.n_decodes and plan.spans]
    assert {plan.n_tokens for plan in beside[:-1]} == {16}
    check_all(rig)


def test_many_decodes_leave_prompts_a_quarter_of_a_mixed_step() -> None:
    """However many sequences decode, a prompt advances."""
    rig = Rig(limits(step_tokens=64, mixed_tokens=8, n_blocks=256))
    for token_id in range(7):
        rig.submit(prompt_of(2, token_id), max_tokens=40)
    rig.step()
    late = rig.submit(prompt_of(20, 9), max_tokens=1)
    for _ in range(10):
        rig.step()
    assert {plan.spans[0].count for plan in rig.plans[1:]} == {2}
    assert rig.answers[late].reason == "length"
    rig.run()
    check_all(rig)


def started(rig: Rig) -> list[SequenceKey]:
    """Return the keys in the order in which the sequences left the queue."""
    answers = [a for a in rig.answers.values() if a.sequence.scheduled_s is not None]
    return [a.sequence.key for a in sorted(answers, key=lambda a: a.sequence.scheduled_s or 0.0)]


def test_priority_goes_first_and_waiting_makes_up_for_it() -> None:
    """One level is worth 30 s: it wins against 20 s of waiting and loses against 40."""
    rig = Rig(limits(max_sequences=1))
    rig.submit(prompt_of(3), max_tokens=60)
    rig.step()
    now_s = rig.now_s
    patient = rig.submit(prompt_of(3, 2), arrival_s=now_s - 40.0)
    usual = rig.submit(prompt_of(3, 3), arrival_s=now_s - 20.0)
    urgent = rig.submit(prompt_of(3, 4), arrival_s=now_s, priority=-1)
    patient_too = rig.submit(prompt_of(3, 5), arrival_s=now_s - 40.0, priority=1)
    rig.run()
    assert started(rig)[1:] == [patient, urgent, usual, patient_too]


def test_equal_arrivals_run_in_the_order_of_submission() -> None:
    """Ties are broken by who came first."""
    rig = Rig(limits(max_sequences=1))
    keys = [rig.submit(prompt_of(3, i), arrival_s=1.0) for i in range(5)]
    rig.run()
    assert started(rig) == keys


@both_lags
@pytest.mark.parametrize("n_steps", range(6))
def test_an_abort_at_any_moment_frees_everything(lag: int, n_steps: int) -> None:
    """One final event, no block left, and the others do not notice."""
    rig = Rig(limits(step_tokens=8, lag=lag))
    key = rig.submit(prompt_of(17), max_tokens=9)
    other = rig.submit(prompt_of(5, 2), max_tokens=9)
    for _ in range(n_steps):
        rig.step()
    rig.abort(key)
    rig.abort(key)
    assert rig.answers[key].reason == "abort"
    assert rig.answers[key].code == "request_aborted"
    rig.run()
    rig.check_answer(rig.answers[other])
    assert rig.scheduler.pool.n_used == 0


def test_a_client_that_leaves_takes_its_sequences_with_it() -> None:
    """Those of the others go on; at a stop of the engine they end too."""
    rig = Rig(limits())
    rig.submit(prompt_of(3), key=(1, 1), max_tokens=40)
    rig.submit(prompt_of(3, 2), key=(2, 1), max_tokens=40)
    rig.submit(prompt_of(3, 3), key=(1, 2), max_tokens=40)
    rig.step()
    rig.take(rig.scheduler.abort_client(1, rig.now_s))
    assert [a.reason for a in rig.answers.values()] == ["abort", None, "abort"]
    rig.take(rig.scheduler.abort_all(rig.now_s))
    assert rig.answers[2, 1].reason == "abort"
    assert rig.scheduler.is_idle and rig.scheduler.pool.n_used == 0


@both_lags
@pytest.mark.parametrize("fault", ["launch", "result"])
def test_a_failing_step_ends_its_own_sequences_only(lag: int, fault: str) -> None:
    """Who waits lives on, and the engine answers afterwards."""
    rig = Rig(limits(max_sequences=2, lag=lag))
    for token_id in range(4):
        rig.submit(prompt_of(5, token_id), max_tokens=6)
    rig.step()
    rig.step(fault=fault)
    rig.run()
    ends = [(a.reason, a.code) for a in rig.answers.values()]
    assert ends[:2] == [("error", "step_failed")] * 2
    assert ends[2:] == [("length", "")] * 2
    assert rig.scheduler.stats.step_errors == 1
    for answer in rig.answers.values():
        rig.check_answer(answer)


@both_lags
def test_bad_logits_end_one_sequence_of_the_step(lag: int) -> None:
    """The error names the cause; the neighbours keep their tokens."""
    rig = Rig(limits(lag=lag))
    for token_id in range(3):
        rig.submit(prompt_of(5, token_id), max_tokens=6)
    rig.step()
    rig.step(fault="nan")
    rig.run()
    assert [a.code for a in rig.answers.values()] == ["nan_logits", "", ""]
    for answer in rig.answers.values():
        rig.check_answer(answer)


@both_lags
def test_a_passed_deadline_ends_a_running_and_a_waiting_sequence(lag: int) -> None:
    """What was drawn until then has been delivered."""
    rig = Rig(limits(max_sequences=1, lag=lag))
    running = rig.submit(prompt_of(3), max_tokens=50, deadline_s=rig.now_s + 6)
    waiting = rig.submit(prompt_of(3, 2), max_tokens=5, deadline_s=rig.now_s + 3)
    last = rig.submit(prompt_of(3, 3), max_tokens=5, deadline_s=rig.now_s + 60)
    rig.run()
    assert [a.reason for a in rig.answers.values()] == ["deadline", "deadline", "length"]
    assert rig.answers[running].code == "deadline_exceeded"
    assert 0 < len(rig.answers[running].tokens) <= 6
    assert rig.answers[waiting].tokens == []
    rig.check_answer(rig.answers[last])


def test_a_stop_token_before_min_tokens_does_not_end() -> None:
    """The sampler masks it; if one comes all the same, the count decides."""
    tokens, _ = alone(prompt_of(3), sampling(), 6)
    rig = Rig(limits())
    key = rig.submit(prompt_of(3), max_tokens=6)
    sequence = rig.answers[key].sequence
    sequence.stop_ids = frozenset(tokens)
    object.__setattr__(sequence, "sampling", sampling(min_tokens=4))
    rig.run()
    assert rig.answers[key].tokens == tokens[:5]


@both_lags
def test_scores_come_with_their_tokens(lag: int) -> None:
    """Prompt logprobs once, whole, with the first token; logprobs one a token; both across chunks."""
    rig = Rig(limits(step_tokens=4, lag=lag))
    params = sampling(logprobs=0, prompt_logprobs=0)
    for n_prompt, max_tokens in ((1, 1), (14, 1), (14, 5)):
        rig.submit(list(range(n_prompt)), max_tokens=max_tokens, sampling=params)
    rig.run()
    check_all(rig)
    assert [len(a.prompt_logprobs or []) for a in rig.answers.values()] == [0, 13, 13]


def test_a_key_cannot_be_used_twice_at_once() -> None:
    """It can again once its sequence has ended."""
    rig = Rig(limits())
    rig.submit(prompt_of(3), key=(0, 1))
    with pytest.raises(RequestError, match="already"):
        rig.scheduler.submit(rig.answers[0, 1].sequence, rig.now_s)
    rig.run()
    rig.submit(prompt_of(3), key=(0, 1))
    rig.run()


def test_a_pool_smaller_than_a_context_is_refused() -> None:
    """Otherwise a long answer could wait for blocks for ever."""
    with pytest.raises(ConfigError, match="at least 16 blocks"):
        limits(n_blocks=15)


@pytest.mark.parametrize("field", ["step_tokens", "max_sequences", "mixed_tokens"])
def test_limits_of_nothing_are_refused(field: str) -> None:
    """A step runs at least one token of one sequence."""
    with pytest.raises(ConfigError, match="at least 1"):
        limits(**{field: 0})


def test_limits_come_from_the_plan() -> None:
    """Every figure is the plan's; a 64th of the blocks is kept for those who run."""
    plan = replace(PLAN, mixed_tokens=48, max_queue=9, n_blocks=640)
    found = SchedulerLimits.of(plan)
    assert (found.n_blocks, found.watermark_blocks, found.max_queue) == (640, 10, 9)
    assert found.prompt_tokens_beside(8) == 40 and found.prompt_tokens_beside(48) == 12


def test_the_figures_add_up() -> None:
    """Counters and histograms of a run whose every latency is known."""
    rig = Rig(limits(max_sequences=1))
    for token_id in range(2):
        rig.submit(prompt_of(9, token_id), max_tokens=3)
    rig.run()
    rig.submit(prompt_of(9), max_tokens=1)
    rig.run()
    stats = rig.scheduler.snapshot()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.steps) == (27, 7, 7)
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (27, 8)
    assert stats.finished == {"length": 3}
    assert sum(stats.time_to_first_token_s.counts) == sum(stats.end_to_end_s.counts) == 3
    assert sum(stats.inter_token_s.counts) == 4
    assert stats.inter_token_s.total == 4.0
    assert sum(stats.time_per_output_token_s.counts) == 2
    assert stats.time_per_output_token_s.total == 2.0
    assert stats.queue_s.total == 0.0 + 3.0 + 0.0
    assert stats.step_tokens.total == rig.runner.n_tokens
    assert stats.blocks_total == 128 and stats.blocks_used == 0
