"""A step's words mean the same to the plain code that reads them as to anyone who reads the plan."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_cases import CONTEXT_TOKENS, N_ROWS, PAGE_TOKENS, Model, empty_rows, packed

import sailfish.kernels
from sailfish.engine.packing import Batch
from sailfish.engine.step import RowRun, RowSampling, RowStart, StepPlan
from sailfish.engine.table import DeviceTable
from sailfish.kernels.plain.step_inputs import append_draws, build_inputs, start_rows
from sailfish.kernels.step_words import RUN_FIELDS, START_FIELDS, max_words
from sailfish.plan.memory import table_bytes

CPU = torch.device("cpu")


@given(st.integers(0, 2**32), st.booleans())
@settings(deadline=None, max_examples=150)
def test_steps_mean_what_their_plans_say(seed: int, is_decode: bool) -> None:
    draw = random.Random(seed)
    model, rows = Model(draw), empty_rows()
    for _ in range(4):
        starts = [model.start(row) for row in draw.sample(range(N_ROWS), draw.randrange(1, N_ROWS))]
        runs, appended = model.runs(is_decode=is_decode)
        is_decode = all(run.count == 1 and run.samples for run in runs)
        pad_to = draw.choice([0, draw.randrange(20), draw.randrange(400)])
        words, layout, at = packed(runs, appended, starts, pad_to)
        start_rows(torch.from_numpy(words), at, len(starts), rows)
        made = build_inputs(torch.from_numpy(words), layout, rows, PAGE_TOKENS)
        model.check(runs, made, max(0, pad_to - sum(run.count for run in runs)), is_decode)
        model.check_rows(rows)
        drawn_S2 = torch.full((500, 2), -7, dtype=torch.int32)
        token_S = torch.tensor([draw.randrange(1000) for _ in made.row_S])
        finite_S = torch.tensor([draw.random() < 0.5 for _ in made.row_S])
        append_draws(made, token_S, finite_S, rows, drawn_S2)
        assert drawn_S2[: len(token_S)].tolist() == [
            [token, int(finite)] for token, finite in zip(token_S.tolist(), finite_S.tolist(), strict=True)
        ]
        for run, token in zip([run for run in runs if run.samples], token_S.tolist(), strict=False):
            assert int(rows.token_RC[run.row, run.start + run.count]) == token
            model.tokens[run.row][run.start + run.count :] = [token]
            model.tokens[run.row] = model.tokens[run.row][: CONTEXT_TOKENS - 1]
        assert rows.token_RC[N_ROWS, 1:].tolist() == [0] * CONTEXT_TOKENS, "padding stays in its place"


def test_rows_that_do_not_fit_into_one_copy_begin_in_several() -> None:
    context, n_rows = 40_000, 5
    table = DeviceTable(n_rows, context, context // 8, 8, CPU)
    draw = random.Random(0)
    sampling = RowSampling(0.0, 9, 1.0, 0.0, 1.0, 0.0, 0.0, 0, 0, ())
    starts = [
        RowStart(row, [draw.randrange(99) for _ in range(30_000)], 1, list(range(row, 3750 + row)), sampling)
        for row in range(n_rows)
    ]
    runs = [RowRun(row, 29_999, 1, True) for row in range(n_rows)]
    plan = StepPlan(0, starts, [], runs)
    layout = table.send(plan, Batch.of(plan))
    _, made = table.inputs(layout, (0, 1, 2, 3, 4, 5), (30_000,) * n_rows, n_rows)
    assert made.token_T.tolist() == [start.token_ids[-1] for start in starts]
    assert made.slot_T.tolist() == [(3749 + row) * 8 + 7 for row in range(n_rows)]
    for start in starts:
        assert table.rows.token_RC[start.row, :30_000].tolist() == start.token_ids


@pytest.mark.parametrize(("n_rows", "context"), [(1, 2), (3, 100), (256, 4096)])
def test_the_largest_row_and_the_most_runs_fit_together(n_rows: int, context: int) -> None:
    sampling = RowSampling(
        *(0.0, 9, 1.0, 0.0, 1.0, 0.0, 0.0, 0, 0),
        stop_token_ids=tuple(range(80)),
        logit_bias=tuple((i, 1.0) for i in range(1024)),
    )
    blocks = -(-context // 2)
    start = RowStart(0, [1] * context, 1, [0] * blocks, sampling)
    table = DeviceTable(n_rows, context, blocks, 2, CPU)
    runs = [RowRun(row, 0, 1, True) for row in range(n_rows)]
    appended = [(row, 0, 5) for row in range(n_rows)]
    plan = StepPlan(0, [start], appended, runs)
    table.send(plan, Batch.of(plan))
    assert table.n_bytes == table_bytes(max_sequences=n_rows, context_tokens=context, page_tokens=2)
    assert max_words(max_sequences=n_rows, context_tokens=context, blocks_per_sequence=blocks) < 1 << 20


def test_the_kernels_read_the_same_records() -> None:
    path = Path(sailfish.kernels.__file__).parent / "cuda/source/step_inputs.cu"
    for name, fields in (("Start", START_FIELDS), ("Run", RUN_FIELDS)):
        body = re.search(rf"struct {name} {{(.*?)}};", path.read_text(), re.DOTALL)
        assert body is not None
        assert tuple(re.findall(r"(\w+)[,;]", body[1])) == fields
