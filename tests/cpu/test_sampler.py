"""The sampler against transformers, against counted draws, and against itself in other batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sailfish.engine import sampler
from sailfish.engine.packing import pack_starts, start_words
from sailfish.engine.sampler import gumbel, sample, top_logprobs
from sailfish.engine.step import RowSampling, RowStart
from sailfish.kernels.plain.step_inputs import start_rows
from sailfish.kernels.rows import Rows

V = 50
GREEDY = RowSampling(0.0, V, 1.0, 0.0, 1.0, 0.0, 0.0, 0, 0, ())
CPU = torch.device("cpu")


def row(**changes: object) -> RowSampling:
    names = RowSampling.__struct_fields__
    return RowSampling(**{name: changes.get(name, getattr(GREEDY, name)) for name in names})


def begin(table: Rows, at: int, n_prompt: int, sampling: RowSampling, token_ids: list[int]) -> None:
    """Start a row of the table as a step does."""
    start = RowStart(at, token_ids, n_prompt, [], sampling)
    words = np.zeros(start_words(start), np.int32)
    pack_starts(words, 0, [start])
    start_rows(torch.from_numpy(words), 0, 1, table)


def draw(logits: torch.Tensor, rows: list[RowSampling], tokens: list[list[int]], n_prompts: list[int]):
    """Sample a batch whose rows hold `tokens`; rows of the table are used in reverse to catch mix-ups."""
    n = len(rows)
    table = Rows.empty(n + 1, 32, 1, CPU)
    for i, (sampling, ids) in enumerate(zip(rows, tokens, strict=True)):
        begin(table, n - i, n_prompts[i], sampling, ids)
    lengths = [len(ids) for ids in tokens]
    return sample(
        logits.clone(),
        torch.arange(n, 0, -1),
        torch.tensor(lengths),
        table,
        rows,
        list(range(n, 0, -1)),
        lengths,
        n_prompts,
    )


def test_temperature_zero_takes_the_likeliest_token() -> None:
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(0))
    tokens, finite = draw(logits, [GREEDY] * 4, [[1]] * 4, [1] * 4)
    assert tokens.tolist() == logits.argmax(1).tolist()
    assert finite.tolist() == [True] * 4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    n = 40_000
    noise = torch.cat([gumbel(torch.full((1000,), s), torch.arange(1000), 5) for s in range(n // 1000)])
    counts = (logits / temperature + noise).argmax(1).bincount(minlength=5).double() / n
    expected = (logits / temperature).softmax(0).double()
    chi2 = float((n * (counts - expected) ** 2 / expected).sum())
    assert chi2 < 18.5  # 99.9% quantile with 4 degrees of freedom


def test_noise_is_uniform_over_seeds_positions_and_ids_alike() -> None:
    for seeds, positions, ids in ((20_000, 1, 1), (1, 20_000, 1), (1, 1, 20_000)):
        noise = gumbel(torch.arange(seeds).repeat(positions), torch.arange(positions).repeat(seeds), ids)
        uniform = torch.exp(-torch.exp(-noise.double())).flatten()
        bins = torch.histc(uniform, bins=20, min=0.0, max=1.0)
        assert float(((bins - 1000) ** 2 / 1000).sum()) < 43.8  # 99.9% quantile, 19 degrees of freedom


@given(
    st.lists(
        st.builds(
            row,
            temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
            top_k=st.sampled_from([1, 2, 7, V]),
            top_p=st.sampled_from([0.1, 0.7, 0.95, 1.0]),
            min_p=st.sampled_from([0.0, 0.1, 1.0]),
            repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
            presence_penalty=st.sampled_from([-1.0, 0.0, 1.5]),
            frequency_penalty=st.sampled_from([0.0, 0.7]),
            seed=st.integers(-(2**63), 2**63 - 1),
            min_tokens=st.integers(0, 5),
            stop_token_ids=st.sampled_from([(), (3,), (0, 9, 17)]),
            logit_bias=st.sampled_from([(), ((4, 3.0), (0, -100.0))]),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_a_row_draws_the_same_token_in_any_batch(rows: list[RowSampling], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), V, generator=generator) * 4
    tokens = [
        torch.randint(
            0, V, (int(torch.randint(2, 20, (1,), generator=generator)),), generator=generator
        ).tolist()
        for _ in rows
    ]
    n_prompts = [max(1, len(ids) // 2) for ids in tokens]
    together, _ = draw(logits, rows, tokens, n_prompts)
    for i, sampling in enumerate(rows):
        alone, _ = draw(logits[i : i + 1], [sampling], [tokens[i]], [n_prompts[i]])
        assert alone.item() == together[i].item()


def test_noise_is_finite_for_every_random_number_there_is() -> None:
    every_23_bits = torch.arange(1 << 23, dtype=torch.int64) << 41
    noise = sampler._to_gumbel(every_23_bits)
    assert torch.isfinite(noise).all()
    assert float(noise.min()) < -2.8 and float(noise.max()) > 16.0
    ends = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    assert torch.isfinite(sampler._to_gumbel(ends)).all()


def test_a_token_that_a_filter_excludes_is_never_drawn() -> None:
    n_vocab, n_draws = 128_256, 400
    logits = torch.full((n_draws, n_vocab), -30.0)
    logits[:, :4] = torch.tensor([30.0, 29.5, 29.0, 28.5])
    rows = [row(temperature=1.0, top_k=4 if i % 2 else n_vocab, seed=i) for i in range(n_draws)]
    table = Rows.empty(n_draws, 2, 1, CPU)
    for i, sampling in enumerate(rows):
        begin(table, i, 1, sampling, [0])
    ids = list(range(n_draws))
    tokens, _ = sample(
        logits,
        torch.tensor(ids),
        torch.ones(n_draws, dtype=torch.int64),
        table,
        rows,
        ids,
        [1] * n_draws,
        [1] * n_draws,
    )
    assert set(tokens.tolist()) == {0, 1, 2, 3}


def test_filters_keep_what_transformers_keeps() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, V, generator=generator) * 3
    for top_k, top_p, min_p in [(5, 1.0, 0.0), (V, 0.8, 0.0), (V, 1.0, 0.2), (12, 0.6, 0.05), (1, 0.3, 0.5)]:
        scaled = logits.clone()
        table = Rows.empty(8, 2, 1, CPU)
        sampling = row(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
        for i in range(8):
            begin(table, i, 1, sampling, [0])
        sampler._keep_likely(scaled, torch.arange(8), table, [sampling] * 8)
        expected = logits.clone()
        if top_k < V:
            expected = TopKLogitsWarper(top_k)(None, expected)
        if top_p < 1:
            expected = TopPLogitsWarper(top_p)(None, expected)
        if min_p > 0:
            expected = MinPLogitsWarper(min_p)(None, expected)
        assert torch.equal(scaled.isinf(), expected.isinf())


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(2))
    ids = [4, 4, 9, 30]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([ids]), logits.clone())
    mine = logits[0].clone()
    sampler._penalise(mine, torch.tensor(ids), 2, row(repetition_penalty=1.7))
    torch.testing.assert_close(mine, expected[0])


def test_presence_and_frequency_count_output_tokens_only() -> None:
    mine = torch.zeros(V)
    sampler._penalise(
        mine, torch.tensor([7, 7, 5, 5, 6]), 2, row(presence_penalty=0.5, frequency_penalty=0.25)
    )
    expected = torch.zeros(V)
    expected[5] = -(0.5 + 2 * 0.25)
    expected[6] = -(0.5 + 0.25)
    torch.testing.assert_close(mine, expected)


def test_stop_tokens_cannot_be_drawn_before_min_tokens() -> None:
    logits = torch.zeros(2, V)
    logits[:, 3] = 50.0
    logits[:, 8] = 10.0
    sampling = row(stop_token_ids=(3,), min_tokens=2)
    tokens, _ = draw(logits, [sampling, sampling], [[1, 2], [1, 2, 5, 6]], [1, 1])
    assert tokens.tolist() == [8, 3]


def test_bias_moves_logits_and_leaves_no_trace_for_the_rows_next_user() -> None:
    table = Rows.empty(1, 4, 1, CPU)
    logits = torch.zeros(1, V)
    logits[0, 1] = 1.0
    args = (torch.tensor([0]), torch.tensor([1]), table)
    biased = row(logit_bias=((0, -100.0), (6, 5.0)))
    begin(table, 0, 1, biased, [0])
    assert sample(logits.clone(), *args, [biased], [0], [1], [1])[0].tolist() == [6]
    other = row(logit_bias=((2, 0.5),))
    begin(table, 0, 1, other, [0])
    assert sample(logits.clone(), *args, [other], [0], [1], [1])[0].tolist() == [1]


def test_a_row_with_nan_or_infinite_logits_is_reported_and_the_others_are_not() -> None:
    logits = torch.randn(3, V)
    logits[1, 4] = math.nan
    logits[2, 9] = math.inf
    _, finite = draw(logits, [GREEDY] * 3, [[1]] * 3, [1] * 3)
    assert finite.tolist() == [True, False, False]


def test_logprobs_are_those_of_log_softmax() -> None:
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(3))
    chosen, top, top_id = top_logprobs(logits, torch.tensor([0, 5, 9]), 4)
    expected = logits.double().log_softmax(1)
    torch.testing.assert_close(
        chosen.double(), expected[torch.arange(3), torch.tensor([0, 5, 9])], atol=1e-6, rtol=0
    )
    torch.testing.assert_close(top_id, expected.topk(4).indices)
    torch.testing.assert_close(top.double(), expected.topk(4).values, atol=1e-6, rtol=0)
