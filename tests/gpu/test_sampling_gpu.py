"""The sampling kernels draw what the engine's sampler draws, for any mix of parameters."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from sailfish.engine.sampler import sample
from sailfish.engine.step import RowSampling
from sailfish.kernels.cuda.sampling import pick
from sailfish.kernels.rows import Rows

pytestmark = pytest.mark.gpu

POSITIONS = 3000
SIZES = [(50, 40, 20), (1003, 64, 10), (32000, 300, 1), (128256, 100, 3)]


def table_of(rows: list[RowSampling], tokens: list[list[int]], n_prompts: list[int]) -> Rows:
    """Write the rows to a table, in reverse, so that a mix-up of rows shows."""
    table = Rows.empty(len(rows) + 1, POSITIONS, 1, torch.device("cuda"))
    for i, (row, ids, n_prompt) in enumerate(zip(rows, tokens, n_prompts, strict=True)):
        r = len(rows) - i
        table.token_RC[r, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        table.n_prompt_R[r] = n_prompt
        table.temperature_R[r], table.top_k_R[r] = row.temperature, row.top_k
        table.top_p_R[r], table.min_p_R[r], table.seed_R[r] = row.top_p, row.min_p, row.seed
        penalties = (row.repetition_penalty, row.presence_penalty, row.frequency_penalty)
        table.penalties_R3[r] = torch.tensor(penalties)
        table.min_length_R[r] = n_prompt + row.min_tokens
        table.n_barred_R[r] = len(row.stop_token_ids)
        table.barred_RS[r, : len(row.stop_token_ids)] = torch.tensor(row.stop_token_ids, dtype=torch.int32)
        table.n_bias_R[r] = len(row.logit_bias)
        if row.logit_bias:
            ids_b, biases = zip(*row.logit_bias, strict=True)
            table.bias_id_RB[r, : len(ids_b)] = torch.tensor(ids_b, dtype=torch.int32)
            table.bias_RB[r, : len(ids_b)] = torch.tensor(biases)
    return table


def compare(logits: Tensor, rows: list[RowSampling], tokens: list[list[int]], n_prompts: list[int]) -> float:
    """Return the share of rows whose token differs from the law's."""
    table = table_of(rows, tokens, n_prompts)
    row_S = torch.arange(len(rows), 0, -1, dtype=torch.int32, device="cuda")
    lengths = [len(ids) for ids in tokens]
    length_S = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    found, finite = pick(logits.clone(), row_S, length_S, table)
    again, _ = pick(logits.clone(), row_S, length_S, table)
    assert torch.equal(found, again)
    expected, expected_finite = sample(
        logits.float(), row_S, length_S, table, rows, row_S.tolist(), lengths, n_prompts
    )
    assert torch.equal(finite, expected_finite)
    return float((found != expected)[expected_finite].float().mean())


def row(rng: random.Random, n_vocab: int) -> RowSampling:
    penalties = (rng.choice([0.8, 1.3]), rng.choice([0.0, 0.6]), rng.choice([0.0, 0.3]))
    if rng.random() < 0.6:
        penalties = (1.0, 0.0, 0.0)
    top_k = rng.choice([1, 2, 20, 50, 1000, n_vocab - 1])
    return RowSampling(
        rng.choice([0.0, 0.3, 0.7, 1.0, 1.0, 2.5]),
        min(top_k, n_vocab) if rng.random() < 0.4 else n_vocab,
        rng.choice([0.05, 0.5, 0.9, 0.95, 0.999]) if rng.random() < 0.5 else 1.0,
        rng.choice([0.02, 0.1, 1.0]) if rng.random() < 0.2 else 0.0,
        *penalties,
        rng.randrange(-(2**63), 2**63),
        rng.choice([0, 5]),
        tuple(rng.sample(range(n_vocab), 3)) if rng.random() < 0.3 else (),
        tuple((i, rng.uniform(-5, 9)) for i in rng.sample(range(n_vocab), 9)) if rng.random() < 0.3 else (),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("n_vocab", "n_rows", "n_rounds"), SIZES)
def test_any_mix_of_rows_draws_what_the_law_draws(
    n_vocab: int, n_rows: int, n_rounds: int, dtype: torch.dtype, code: str
) -> None:
    rng = random.Random(n_vocab)
    wrong = 0.0
    for _ in range(n_rounds):
        rows = [row(rng, n_vocab) for _ in range(n_rows)]
        tokens = [[rng.randrange(n_vocab) for _ in range(rng.choice([2, 30, POSITIONS - 1]))] for _ in rows]
        n_prompts = [max(1, len(ids) - rng.choice([0, 1, 4, 1000])) for ids in tokens]
        scale = torch.tensor([rng.choice([0.02, 1.0, 3.0, 30.0]) for _ in rows], device="cuda")
        logits = (torch.randn(n_rows, n_vocab, device="cuda") * scale[:, None]).to(dtype)
        wrong += compare(logits, rows, tokens, n_prompts) / n_rounds
    assert wrong <= 2e-3, "more than a rounding at a filter's edge explains"


def test_ties_go_to_the_lowest_token() -> None:
    logits = torch.zeros(3, 128256, device="cuda", dtype=torch.bfloat16)
    logits[1, [7, 9000, 128255]] = 1.0
    logits[2, [128000, 128255]] = 1.0
    greedy = RowSampling(0.0, 128256, 1.0, 0.0, 1.0, 0.0, 0.0, 0, 0, ())
    table = table_of([greedy] * 3, [[1]] * 3, [1] * 3)
    ones = torch.ones(3, dtype=torch.int32, device="cuda")
    assert pick(logits, ones, ones, table)[0].tolist() == [0, 7, 128000]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_row_that_is_not_finite_is_told_and_hurts_no_other(
    value: float, temperature: float, top_p: float
) -> None:
    logits = torch.randn(4, 32000, device="cuda")
    logits[1] = value
    logits[2, 31999] = value
    plain = RowSampling(temperature, 32000, top_p, 0.0, 1.0, 0.0, 0.0, 5, 0, ())
    rows, ones = table_of([plain] * 4, [[1]] * 4, [1] * 4), torch.ones(4, dtype=torch.int32, device="cuda")
    clean = pick(logits[[0, 3]].contiguous(), ones[:2], ones[:2], rows)[0]
    tokens, finite = pick(logits.clone(), ones, ones, rows)
    assert finite.tolist() == [True, False, False, True]
    assert bool(((tokens >= 0) & (tokens < 32000)).all())
    assert torch.equal(tokens[[0, 3]], clean)


def test_draws_are_replayed_by_a_graph_for_other_rows() -> None:
    n_vocab, n = 32000, 16
    rng = random.Random(3)
    logits = torch.randn(n, n_vocab, device="cuda", dtype=torch.bfloat16)
    rows = [row(rng, n_vocab) for _ in range(n)]
    table = table_of(rows, [[1, 2, 3]] * n, [1] * n)
    row_S = torch.arange(n, 0, -1, dtype=torch.int32, device="cuda")
    length_S = torch.full((n,), 3, dtype=torch.int32, device="cuda")
    pick(logits, row_S, length_S, table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token_S, _ = pick(logits, row_S, length_S, table)
    for _ in range(3):
        logits.copy_(torch.randn(n, n_vocab, device="cuda"))
        row_S.copy_(row_S[torch.randperm(n, device="cuda")])
        graph.replay()
        assert torch.equal(token_S, pick(logits, row_S, length_S, table)[0])
