"""Random steps over a device table, and what they mean by brute force, whatever the device."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch

from sailfish.engine.packing import Batch, pack_runs, pack_starts, start_words
from sailfish.engine.step import RowRun, RowSampling, RowStart, StepPlan
from sailfish.kernels.rows import Rows, StepTensors
from sailfish.kernels.step_words import StepLayout

N_ROWS, CONTEXT_TOKENS, PAGE_TOKENS = 9, 70, 8
N_BLOCKS = -(-CONTEXT_TOKENS // PAGE_TOKENS)


def empty_rows(device: str = "cpu") -> Rows:
    """A small table with one row for padding."""
    return Rows.empty(N_ROWS + 1, CONTEXT_TOKENS + 1, N_BLOCKS, torch.device(device))


def random_sampling(draw: random.Random) -> RowSampling:
    """Sampling parameters of all kinds."""
    return RowSampling(
        temperature=draw.choice([0.0, 0.3, 1.5]),
        top_k=draw.randrange(1, 99),
        top_p=draw.random(),
        min_p=draw.random(),
        repetition_penalty=draw.random() + 0.5,
        presence_penalty=draw.random(),
        frequency_penalty=draw.random(),
        seed=draw.randrange(-(2**63), 2**63),
        min_tokens=draw.choice([0, 3, 2**31 - 1]),
        stop_token_ids=tuple(draw.sample(range(99), draw.randrange(0, 5))),
        logit_bias=tuple((i, draw.uniform(-9, 9)) for i in draw.sample(range(99), draw.randrange(0, 5))),
    )


@dataclass
class Model:
    """Rows as Python lists, and what the runs of a step are by definition."""

    draw: random.Random
    tokens: dict[int, list[int]] = field(default_factory=dict)
    blocks: dict[int, list[int]] = field(default_factory=dict)
    starts: dict[int, RowStart] = field(default_factory=dict)

    def start(self, row: int) -> RowStart:
        """Begin a row with random tokens and the blocks that they need."""
        n = self.draw.randrange(1, CONTEXT_TOKENS)
        self.tokens[row] = [self.draw.randrange(1000) for _ in range(n)]
        self.blocks[row] = [self.draw.randrange(500) for _ in range(-(-n // PAGE_TOKENS))]
        tokens, blocks = list(self.tokens[row]), list(self.blocks[row])
        n_prompt = self.draw.randrange(1, n + 1)
        self.starts[row] = RowStart(row, tokens, n_prompt, blocks, random_sampling(self.draw))
        return self.starts[row]

    def runs(self, *, is_decode: bool) -> tuple[list[RowRun], list[tuple[int, int, int]]]:
        """Draw runs of distinct rows, decodes first, and the blocks that decodes need."""
        rows = self.draw.sample(sorted(self.tokens), self.draw.randrange(1, len(self.tokens) + 1))
        n_single = len(rows) if is_decode else self.draw.randrange(0, len(rows) + 1)
        runs, appended = [], []
        for i, row in enumerate(rows):
            n = len(self.tokens[row])
            if i < n_single:
                start = n - 1
                if start // PAGE_TOKENS >= len(self.blocks[row]) or self.draw.random() < 0.3:
                    block = self.draw.randrange(500)
                    self.blocks[row] = [*self.blocks[row][: start // PAGE_TOKENS], block]
                    appended.append((row, start // PAGE_TOKENS, block))
                runs.append(RowRun(row, start, 1, True))
            else:
                n = min(n, len(self.blocks[row]) * PAGE_TOKENS)
                count = self.draw.randrange(1, n + 1)
                start = self.draw.randrange(0, n - count + 1)
                runs.append(RowRun(row, start, count, self.draw.random() < 0.5))
        return runs, appended

    def check(self, runs: list[RowRun], made: StepTensors, n_padding: int, is_decode: bool) -> None:
        """Compare a step's inputs with their definition; n_padding: tokens."""
        places = [(run.row, p) for run in runs for p in range(run.start, run.start + run.count)]
        assert made.token_T[: len(places)].tolist() == [self.tokens[r][p] for r, p in places]
        assert made.position_T.tolist() == [p for _, p in places] + [0] * n_padding
        slots = [self.blocks[r][p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for r, p in places]
        assert made.slot_T.tolist() == slots + [-1] * n_padding
        counts = [1] * n_padding if is_decode else [n_padding] * (n_padding > 0)
        assert made.row_B.tolist() == [run.row for run in runs] + [N_ROWS] * len(counts)
        assert made.kv_len_B.tolist() == [run.start + run.count for run in runs] + [0] * len(counts)
        n_padding = len(counts) if is_decode else 0  # samples
        counts = [run.count for run in runs] + counts
        assert made.query_start_B1.tolist() == np.cumsum([0, *counts]).tolist()
        ends = np.cumsum([run.count for run in runs])
        sampled = [i for i, run in enumerate(runs) if run.samples]
        if made.at_S is not None:
            assert made.at_S.tolist() == [ends[i] - 1 for i in sampled]
        assert made.row_S.tolist() == [runs[i].row for i in sampled] + [N_ROWS] * n_padding
        assert made.length_S.tolist() == [runs[i].start + runs[i].count for i in sampled] + [0] * n_padding

    def check_rows(self, rows: Rows) -> None:
        """Compare every row that began with what it was given."""
        for row, start in self.starts.items():
            sampling = start.sampling
            assert rows.token_RC[row, : len(self.tokens[row])].tolist() == self.tokens[row]
            assert rows.block_RW[row, : len(self.blocks[row])].tolist() == self.blocks[row]
            n_barred, n_bias = int(rows.n_barred_R[row]), int(rows.n_bias_R[row])
            assert tuple(rows.barred_RS[row, :n_barred].tolist()) == sampling.stop_token_ids
            assert rows.bias_id_RB[row, :n_bias].tolist() == [i for i, _ in sampling.logit_bias]
            biases = np.array([bias for _, bias in sampling.logit_bias], np.float32)
            assert rows.bias_RB[row, :n_bias].tolist() == biases.tolist()
            assert int(rows.n_prompt_R[row]) == start.n_prompt
            assert int(rows.top_k_R[row]) == sampling.top_k
            assert int(rows.seed_R[row]) == sampling.seed
            assert int(rows.min_length_R[row]) == min(start.n_prompt + sampling.min_tokens, 2**31 - 1)
            numbers = (rows.temperature_R, rows.top_p_R, rows.min_p_R)
            asked = (sampling.temperature, sampling.top_p, sampling.min_p)
            assert [float(x[row]) for x in numbers] == np.array(asked, np.float32).tolist()
            penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
            assert rows.penalties_R3[row].tolist() == np.array(penalties, np.float32).tolist()


def packed(
    runs: list[RowRun], appended: list[tuple[int, int, int]], starts: list[RowStart], pad_to: int
) -> tuple[np.ndarray, StepLayout, int]:
    """Return a step's words, its layout, and where the rows that begin lie."""
    words = np.full(500 + 4 * pad_to + sum(map(start_words, starts)), 0x5A5A5A5A, np.int32)
    layout, at = pack_runs(words, Batch.of(StepPlan(0, [], [], runs)), appended, pad_to, N_ROWS)
    pack_starts(words, at, starts)
    return words, layout, at
