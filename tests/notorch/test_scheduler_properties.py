"""Whatever arrives, fails or leaves: every sequence gets the tokens it would get alone, and one end."""

from __future__ import annotations

from random import Random
from typing import Any

import hypothesis.strategies as st
import pytest
from fake_runner import Rig, sampling
from hypothesis import event, given, settings

from sailfish.engine.limits import SchedulerLimits
from sailfish.engine.sequence import SequenceKey

_N_STEPS = 30
"""Steps during which requests arrive and leave and steps fail; then the rest is run to its end."""


def some_limits(random: Random, lag: int) -> SchedulerLimits:
    """Return a tiny engine that is short of nearly everything."""
    page_tokens = random.randint(1, 4)
    context_tokens = random.choice([40, 30, 24, 17, 9, 2])
    needed = -(-context_tokens // page_tokens)
    return SchedulerLimits(
        max_sequences=random.randint(1, 6),
        step_tokens=random.choice([1, 3, 6, 12, 40]),
        context_tokens=context_tokens,
        max_queue=random.choice([3, 20]),
        page_tokens=page_tokens,
        n_blocks=needed + random.randint(0, needed),
        lag=lag,
        mixed_tokens=random.choice([None, 1, 4, 9]),
        prefix_cache=random.random() < 0.7,
        watermark_blocks=random.randint(0, 2),
    )


def some_request(random: Random) -> dict[str, Any]:
    """Return a request whose prompt often shares its beginning with others."""
    shared = random.choice([[], [1, 2], [1, 2, 3, 4, 5, 6, 7, 8], [3] * 12])
    tenant = random.randint(0, 1)
    return {
        "prompt": shared + [random.randint(0, 3) for _ in range(random.randint(0, 5))],
        "max_tokens": random.choice([None, None, 1, 6, 15]),
        "priority": random.randint(-1, 1),
        "tenant": str(tenant),
        "needs_host": random.random() < 0.2,
        "sampling": sampling(
            tenant=tenant,
            stop_token_ids=tuple({random.randint(0, 10) for _ in range(random.choice([0, 0, 1, 3]))}),
            min_tokens=random.choice([0, 0, 3]),
            logprobs=random.choice([None, 0]),
            prompt_logprobs=random.choice([None, None, None, 0]),
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 1])
@settings(max_examples=500, deadline=None)
@given(random=st.randoms(use_true_random=True))
def test_every_sequence_gets_the_tokens_it_would_get_alone(lag: int, random: Random) -> None:
    """Chunks, prefix hits, preemption, aborts, deadlines and failing steps change nothing."""
    rig = Rig(some_limits(random, lag), step_s=random.choice([1.0, 20.0]))
    arrivals = sorted(random.randrange(random.choice([5, _N_STEPS])) for _ in range(random.randint(1, 16)))
    n_faults = random.choice([0, 0, 1, 3])
    faults = {random.randrange(_N_STEPS): random.choice(["launch", "result", "nan"]) for _ in range(n_faults)}
    leaving: dict[SequenceKey, int] = {}
    for step in range(_N_STEPS):
        for _ in range(arrivals.count(step)):
            allowed_s = random.choice([None, None, None, random.randint(0, 200)])
            deadline_s = None if allowed_s is None else rig.now_s + allowed_s
            key = rig.submit(deadline_s=deadline_s, **some_request(random))
            if random.random() < 0.2:
                leaving[key] = step + random.randint(0, 8)
        for key in [key for key, at_step in leaving.items() if at_step == step and key in rig.answers]:
            rig.abort(key)
        rig.step(fault=faults.get(step, ""))
    rig.run()

    assert rig.scheduler.pool.n_used == 0
    for key, answer in rig.answers.items():
        rig.check_answer(answer)
        allowed = {"stop", "length"}
        allowed |= {"abort"} if key in leaving else set()
        allowed |= {"error"} if key in rig.hurt else set()
        allowed |= {"deadline"} if answer.sequence.deadline_s is not None else set()
        assert answer.reason in allowed, f"{key} ended with {answer.reason} ({answer.code})"
    stats = rig.scheduler.snapshot()
    assert sum(stats.finished.values()) == len(rig.answers)
    assert sum(stats.refused.values()) == len(rig.refused)
    assert stats.generated_tokens == sum(len(a.tokens) for a in rig.answers.values())
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    event(f"preemptions: {stats.preemptions > 0}")
    event(f"prefix hits: {stats.prefix_hit_tokens > 0}")
    for reason in stats.finished:
        event(f"ends: {reason}")
