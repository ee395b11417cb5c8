"""Packs what a step changes into the 32-bit words that one copy takes to the device. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sailfish.engine.step import RowSampling, RowStart, StepPlan
from sailfish.kernels.step_words import (
    APPENDED_WORDS,
    RUN_WORDS,
    RUNS_AT,
    START_FIELDS,
    START_WORDS,
    StepLayout,
)

Words = NDArray[np.int32]
_FIRST_FLOAT = START_FIELDS.index("temperature")
_MOST = int(np.iinfo(np.int32).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The runs of a step (B) as arrays."""

    row_B: Words
    start_B: Words
    count_B: Words
    samples_B: NDArray[np.bool_]
    is_decode: bool
    """Every run is one token and samples."""

    @classmethod
    def of(cls, plan: StepPlan) -> Batch:
        """Read a plan's runs: the decodes as they lie in the plan, which they share, then the spans."""
        row_B = np.frombuffer(plan.decode_rows, np.int32)
        start_B = np.frombuffer(plan.decode_starts, np.int32)
        count_B, samples_B = np.ones(len(row_B), np.int32), np.ones(len(row_B), np.bool_)
        spans = plan.spans
        if not spans:
            return cls(row_B=row_B, start_B=start_B, count_B=count_B, samples_B=samples_B, is_decode=True)
        counts, samples = [run.count for run in spans], [run.samples for run in spans]
        return cls(
            row_B=np.append(row_B, np.array([run.row for run in spans], np.int32)),
            start_B=np.append(start_B, np.array([run.start for run in spans], np.int32)),
            count_B=np.append(count_B, np.array(counts, np.int32)),
            samples_B=np.append(samples_B, np.array(samples, np.bool_)),
            is_decode=all(samples) and counts.count(1) == len(counts),
        )

    @property
    def sampled_row_S(self) -> Words:
        """Rows of the runs that sample."""
        return self.row_B if self.is_decode else self.row_B[self.samples_B]

    @property
    def n_single(self) -> int:
        """Runs at the beginning that are one token each."""
        if self.is_decode:
            return len(self.count_B)
        longer = self.count_B != 1
        return int(longer.argmax()) if longer.any() else len(longer)

    @property
    def query_start_B1(self) -> Words:
        """Where each run's tokens begin in the step; at the end the number of tokens."""
        if self.is_decode:
            return np.arange(len(self.count_B) + 1, dtype=np.int32)
        query_start_B1 = np.zeros(len(self.count_B) + 1, np.int32)
        np.cumsum(self.count_B, out=query_start_B1[1:])
        return query_start_B1


def pack_runs(
    words: Words, batch: Batch, appended: Sequence[tuple[int, int, int]], pad_to: int, padding_row: int
) -> tuple[StepLayout, int]:
    """Write the runs and the appended blocks; return their layout, and the first word after them.

    A decode is padded to `pad_to` runs of one token, another step to `pad_to` tokens by one run; those
    runs are of `padding_row`.
    """
    n = len(batch.row_B)
    n_tokens = n if batch.is_decode else int(batch.count_B.sum())
    n_padding = max(pad_to - n_tokens, 0)  # tokens
    n_runs = n + (n_padding if batch.is_decode else n_padding > 0)
    run_words = words[RUNS_AT : RUNS_AT + RUN_WORDS * (n_runs + 1)].reshape(-1, RUN_WORDS)
    run_words[:n, 0] = batch.row_B
    run_words[:n, 1] = batch.start_B
    run_words[n:, 0] = padding_row
    if batch.is_decode:
        run_words[n:, 1] = -1
        run_words[:, 2] = np.arange(n_runs + 1, dtype=np.int32)
        layout = StepLayout.decode(n_runs)
    else:
        run_words[: n + 1, 2] = batch.query_start_B1
        run_words[n:, 1] = -n_padding
        run_words[n_runs, 2] = n_tokens + n_padding
        sample_S = batch.samples_B.nonzero()[0]
        layout = StepLayout(n_runs, n_tokens + n_padding, len(sample_S), False)
        words[layout.samples_at : layout.appended_at] = sample_S
    words[0] = len(appended)
    end = layout.appended_at + APPENDED_WORDS * len(appended)
    if appended:
        words[layout.appended_at : end] = [word for block in appended for word in block]
    return layout, end


def start_words(start: RowStart) -> int:
    """Return how many words a row that begins takes."""
    sampling = start.sampling
    n_lists = len(start.token_ids) + len(start.block_ids) + len(sampling.stop_token_ids)
    return START_WORDS + n_lists + 2 * len(sampling.logit_bias)


def pack_starts(words: Words, at: int, starts: Sequence[RowStart]) -> int:
    """Write rows that begin at word `at`; return the first word after them."""
    end = at + START_WORDS * len(starts)
    for i, start in enumerate(starts):
        record = words[at + i * START_WORDS : at + (i + 1) * START_WORDS]
        sampling = start.sampling
        places: list[int] = []
        ids = [token_id for token_id, _ in sampling.logit_bias]
        for values in (start.token_ids, start.block_ids, sampling.stop_token_ids, ids):
            places += len(values), end
            words[end : end + len(values)] = values
            end += len(values)
        biases = [bias for _, bias in sampling.logit_bias]
        words[end : end + len(biases)].view(np.float32)[:] = biases
        end += len(biases)
        min_length = min(start.n_prompt + sampling.min_tokens, _MOST)
        record[: _FIRST_FLOAT - 2] = (start.row, start.n_prompt, *places, sampling.top_k, min_length)
        record[_FIRST_FLOAT - 2 : _FIRST_FLOAT] = np.array([sampling.seed], np.int64).view(np.int32)
        record[_FIRST_FLOAT:].view(np.float32)[:] = _numbers(sampling)
    return end


def _numbers(sampling: RowSampling) -> tuple[float, ...]:
    return (
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
    )
