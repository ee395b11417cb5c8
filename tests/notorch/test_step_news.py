"""Decodes travel as arrays: what they say is what one object a run, and one event a token, would say."""

from __future__ import annotations

import random
from array import array
from collections import defaultdict

import msgspec
import numpy as np
import pytest
from fake_runner import LoopRunner, alone, sampling

from sailfish.engine import wire
from sailfish.engine.limits import SchedulerLimits
from sailfish.engine.loop import EngineLoop
from sailfish.engine.packing import Batch, pack_runs
from sailfish.engine.scheduler import Scheduler
from sailfish.engine.step import RowRun, RowSampling, StepPlan, decode_plan, encode


@pytest.mark.parametrize("n_decodes", [0, 1, 7])
@pytest.mark.parametrize("n_spans", [0, 1, 4])
@pytest.mark.parametrize("pad_to", [0, 64])
def test_decodes_in_arrays_are_packed_as_runs_of_one_token_are(
    n_decodes: int, n_spans: int, pad_to: int
) -> None:
    draw = random.Random(n_decodes * 10 + n_spans)
    rows = draw.sample(range(30), n_decodes + n_spans)
    decodes = [RowRun(row, draw.randrange(99), 1, True) for row in rows[:n_decodes]]
    spans = [RowRun(row, 3, draw.randrange(1, 9), draw.random() < 0.5) for row in rows[n_decodes:]]
    appended = [(row, 1, draw.randrange(99)) for row in rows[:n_decodes:2]]
    in_arrays = StepPlan(
        *(5, [], appended, spans),
        array("i", [run.row for run in decodes]).tobytes(),
        array("i", [run.start for run in decodes]).tobytes(),
    )
    in_objects = StepPlan(5, [], appended, decodes + spans)
    assert decode_plan(encode(in_arrays)) == in_arrays
    assert in_arrays.runs == in_objects.runs
    assert in_arrays.n_runs == in_objects.n_runs == n_decodes + n_spans
    assert in_arrays.n_tokens == in_objects.n_tokens
    packed = []
    for plan in (in_arrays, in_objects):
        words, batch = np.zeros(500, np.int32), Batch.of(plan)
        packed.append((pack_runs(words, batch, plan.appended, pad_to, 30), words.tolist()))
        assert batch.query_start_B1.tolist() == np.cumsum([0, *(run.count for run in plan.runs)]).tolist()
        assert batch.sampled_row_S.tolist() == [run.row for run in plan.runs if run.samples]
        n_single = next((i for i, run in enumerate(plan.runs) if run.count > 1), len(plan.runs))
        assert batch.n_single == n_single
    assert packed[0] == packed[1]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("n_clients", [1, 3])
def test_every_client_hears_all_tokens_of_its_sequences_and_of_no_others(n_clients: int, lag: int) -> None:
    limits = SchedulerLimits(
        max_sequences=6, step_tokens=9, context_tokens=32, max_queue=99, page_tokens=4, n_blocks=30, lag=lag
    )
    heard: dict[tuple[int, int], list[int]] = defaultdict(list)
    ends: dict[tuple[int, int], str] = {}
    n_cached: dict[tuple[int, int], int] = defaultdict(int)
    n_plain = 0

    def hear(client: int, message: wire.ToClient) -> None:
        nonlocal n_plain
        message = msgspec.msgpack.decode(wire.frame(message)[4:], type=wire.ToClient)  # as a socket brings it
        if not isinstance(message, wire.Events):
            return
        n_plain += len(message.keys)
        assert len({event.key for event in message.items}) == len(message.items), "each is told of once"
        for event in message.items:
            assert (client, event.key) not in ends, "news after the end"
            heard[client, event.key] += event.token_ids
            n_cached[client, event.key] = max(n_cached[client, event.key], event.n_cached)
            if event.finish is not None:
                ends[client, event.key] = event.finish.reason

    scheduler = Scheduler(limits, engine_digest="digest", kv_dtype="float32")
    loop = EngineLoop(scheduler, LoopRunner(limits), hear, lag, lambda: 0)
    draw = random.Random(0)
    asked: dict[tuple[int, int], tuple[list[int], RowSampling, int]] = {}
    for key in range(24):
        prompt = [draw.randrange(3) for _ in range(draw.randrange(1, 16))]
        params = sampling(
            stop_token_ids=(1,) if key % 3 == 0 else (),
            min_tokens=key % 4,
            logprobs=0 if key % 5 == 0 else None,
        )
        who = (key % n_clients, key)
        asked[who] = (prompt, params, draw.randrange(1, 16))
        loop.inbox.put((who[0], wire.Submit(key, prompt, params, asked[who][2], 0, None, "")))
    loop._take_messages(None)
    while not scheduler.is_idle:
        loop.step()
    for who, (prompt, params, max_tokens) in asked.items():
        assert (heard[who], ends[who]) == alone(prompt, params, max_tokens)
    assert n_plain > 50, "most tokens come in arrays"
    assert sum(n_cached.values()) == scheduler.stats.prefix_hit_tokens > 0
