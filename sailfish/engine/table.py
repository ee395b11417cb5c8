"""The device's persistent table: one row per live sequence, changed only by each step's differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sailfish.engine.packing import Batch, pack_runs, pack_starts, start_words
from sailfish.engine.step import RowSampling, RowStart, StepPlan
from sailfish.engine.transfer import ArraysDown, Pending, WordsUp
from sailfish.kernels.contract import AttentionSpan
from sailfish.kernels.cuda import step_inputs as cuda_step
from sailfish.kernels.plain import step_inputs as plain_step
from sailfish.kernels.rows import Rows, StepTensors
from sailfish.kernels.step_words import StepLayout, max_words
from sailfish.models.decoder import StepInputs


class DeviceTable:
    """Tokens, block lists and sampling parameters of every row, resident on the device."""

    def __init__(
        self,
        n_rows: int,
        context_tokens: int,
        blocks_per_sequence: int,
        page_tokens: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self.page_tokens = page_tokens
        self.context_tokens = context_tokens
        self.rows = Rows.empty(n_rows + 1, context_tokens + 1, blocks_per_sequence, device)
        """The last row is nobody's: runs that only pad a captured step are of it."""
        self.row_sampling: list[RowSampling | None] = [None] * n_rows
        """Host copies of what the rows were started with."""
        self.n_prompt: list[int] = [0] * n_rows
        self._wants_logprobs_R = np.zeros(n_rows, np.bool_)
        n_words = max_words(
            max_sequences=n_rows, context_tokens=context_tokens, blocks_per_sequence=blocks_per_sequence
        )
        self._words = WordsUp(n_words, device)
        self._drawn_S2 = torch.zeros(n_rows, 2, dtype=torch.int32, device=device)
        self._draws = ArraysDown(self._drawn_S2)
        self._step = cuda_step if device.type == "cuda" else plain_step

    @property
    def n_bytes(self) -> int:
        """Device memory of the table, in bytes."""
        return self.rows.n_bytes + self._words.device_words.nbytes + self._drawn_S2.nbytes

    def note(self, starts: Sequence[RowStart]) -> None:
        """Keep on the host what decides how rows that begin are run."""
        for start in starts:
            self.row_sampling[start.row] = start.sampling
            self.n_prompt[start.row] = start.n_prompt
            self._wants_logprobs_R[start.row] = start.sampling.logprobs is not None

    def wanting_logprobs(self, batch: Batch) -> list[int]:
        """Return which of the step's samples want the log-probabilities of their draw."""
        at: list[int] = self._wants_logprobs_R[batch.sampled_row_S].nonzero()[0].tolist()
        return at

    def sampling_of(self, row: int) -> RowSampling:
        """Return the sampling parameters of a row that runs."""
        sampling = self.row_sampling[row]
        assert sampling is not None, f"row {row} runs but was never started"
        return sampling

    def send(self, plan: StepPlan, batch: Batch, pad_to: int = 0) -> StepLayout:
        """Send the step's differences to the device, in one copy unless many long rows begin.

        A decode is padded to `pad_to` runs, another step to `pad_to` tokens.
        """
        words = self._words.begin()
        layout, end = pack_runs(words, batch, plan.appended, pad_to, len(self.row_sampling))
        sent, starts = 0, plan.starts
        while True:
            at, n, n_words = end, 0, end
            while n < len(starts) and n_words + start_words(starts[n]) <= len(words):
                n_words += start_words(starts[n])
                n += 1
            self._words.send(sent, pack_starts(words, at, starts[:n]))
            if n:
                self._step.start_rows(self._words.device_words, at, n, self.rows)
            starts = starts[n:]
            if not starts:
                return layout
            words, sent = self._words.begin(), end

    def inputs(
        self,
        layout: StepLayout,
        query_start: tuple[int, ...],
        kv_len: tuple[int, ...],
        n_single: int,
        into_3T: Tensor | None = None,
    ) -> tuple[StepInputs, StepTensors]:
        """Make the inputs of the step sent last.

        query_start, kv_len, n_single: as `AttentionSpan` says, of the first runs; others only pad. into_3T:
        int64, where tokens, positions and slots go; None: new memory.
        """
        words, n = self._words.device_words, len(kv_len)
        made = self._step.build_inputs(words, layout, self.rows, self.page_tokens, into_3T)
        span = AttentionSpan(
            block_table_RW=self.rows.block_RW,
            row_B=made.row_B[:n],
            query_start=query_start,
            kv_len=kv_len,
            kv_len_B=made.kv_len_B[:n],
            query_start_B1=made.query_start_B1[: n + 1],
            n_single=n_single,
        )
        inputs = StepInputs(token_T=made.token_T, position_T=made.position_T, slot_T=made.slot_T, span=span)
        return inputs, made

    def append(self, made: StepTensors, token_S: Tensor, finite_S: Tensor) -> None:
        """Write each row's drawn token behind its tokens, and where `take_draws` finds it."""
        self._step.append_draws(made, token_S, finite_S, self.rows, self._drawn_S2)

    def drawn(self, at_b: Tensor) -> Tensor:
        """Return the tokens (int64) of some of the step's draws."""
        return self._drawn_S2[at_b, 0].long()

    def take_draws(self, n_samples: int) -> Pending:
        """Send the step's first draws to the host: [S, 2] of token and whether its logits were finite."""
        return self._draws.take(n_samples)
