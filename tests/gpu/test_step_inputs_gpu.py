"""The kernels that start rows, build inputs and append draws do what the plain code does."""

from __future__ import annotations

import random
from dataclasses import fields

import pytest
import torch
from step_cases import N_ROWS, PAGE_TOKENS, Model, empty_rows, packed

from sailfish.kernels.cuda import step_inputs as cuda_step
from sailfish.kernels.plain import step_inputs as plain_step
from sailfish.kernels.rows import Rows

pytestmark = pytest.mark.gpu


def assert_equal(one: Rows, other: Rows) -> None:
    for field in fields(Rows):
        assert torch.equal(getattr(one, field.name).cpu(), getattr(other, field.name)), field.name


@pytest.mark.parametrize("seed", range(25))
def test_the_kernels_do_what_the_plain_code_does(seed: int) -> None:
    draw = random.Random(seed)
    model, rows, twin = Model(draw), empty_rows("cuda"), empty_rows()
    for is_decode in (False, True, True):
        starts = [model.start(row) for row in draw.sample(range(N_ROWS), draw.randrange(1, N_ROWS))]
        runs, appended = model.runs(is_decode=is_decode)
        is_decode = all(run.count == 1 and run.samples for run in runs)
        pad_to = draw.randrange(0, 300)
        words, layout, at = packed(runs, appended, starts, pad_to)
        up = torch.from_numpy(words).cuda()
        cuda_step.start_rows(up, at, len(starts), rows)
        plain_step.start_rows(torch.from_numpy(words), at, len(starts), twin)
        made = cuda_step.build_inputs(up, layout, rows, PAGE_TOKENS)
        expected = plain_step.build_inputs(torch.from_numpy(words), layout, twin, PAGE_TOKENS)
        model.check(runs, made, max(0, pad_to - sum(run.count for run in runs)), is_decode)
        for field in fields(expected):
            one, other = getattr(made, field.name), getattr(expected, field.name)
            assert (one is None) == (other is None)
            if one is not None:
                assert (one.dtype, one.tolist()) == (other.dtype, other.tolist()), field.name
        n = len(made.row_S)
        token_S = torch.tensor([draw.randrange(1000) for _ in range(n)], dtype=torch.int64)
        token_S[len([run for run in runs if run.samples]) :] = 5  # padding races for one place
        finite_S = torch.tensor([draw.random() < 0.5 for _ in range(n)], dtype=torch.bool)
        drawn_S2 = torch.full((500, 2), -7, dtype=torch.int32)
        drawn_up_S2 = drawn_S2.cuda()
        if n:
            cuda_step.append_draws(made, token_S.cuda(), finite_S.cuda(), rows, drawn_up_S2)
            plain_step.append_draws(expected, token_S, finite_S, twin, drawn_S2)
        assert torch.equal(drawn_up_S2.cpu(), drawn_S2)
        assert_equal(rows, twin)
        for run, token in zip([run for run in runs if run.samples], token_S.tolist(), strict=False):
            model.tokens[run.row][run.start + run.count :] = [token]
            model.tokens[run.row] = model.tokens[run.row][:60]
