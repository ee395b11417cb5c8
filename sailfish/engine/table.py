"""The device's persistent table: one row per live sequence, changed only by each step's differences."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sailfish.engine.sampler import SamplingTable
from sailfish.engine.step import RowRun, RowSampling, RowStart, StepPlan
from sailfish.engine.transfer import upload
from sailfish.kernels.contract import AttentionSpan
from sailfish.models.decoder import StepInputs


class DeviceTable:
    """Tokens, block lists and sampling parameters of every row (R), resident on the device."""

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
        self.token_RC = torch.zeros(n_rows, context_tokens + 1, dtype=torch.int32, device=device)
        self.block_RW = torch.zeros(n_rows, blocks_per_sequence, dtype=torch.int32, device=device)
        self.sampling = SamplingTable.empty(n_rows, device)
        self.row_sampling: list[RowSampling | None] = [None] * n_rows
        """Host copies of what the rows were started with."""
        self.n_prompt: list[int] = [0] * n_rows

    @property
    def n_bytes(self) -> int:
        """Device memory of the table, in bytes."""
        columns = [getattr(self.sampling, name) for name in self.sampling.__slots__]
        tensors = [self.token_RC, self.block_RW, *(c for c in columns if isinstance(c, Tensor))]
        return sum(t.nbytes for t in tensors)

    def apply(self, plan: StepPlan) -> None:
        """Write the rows that begin and the blocks that were appended."""
        for start in plan.starts:
            self._start(start)
        if plan.appended:
            row_A, index_A, block_A = upload(np.array(plan.appended, dtype=np.int64).T, self.device)
            self.block_RW[row_A, index_A] = block_A.to(torch.int32)

    def inputs(self, runs: list[RowRun]) -> StepInputs:
        """Gather the step's tokens, positions, slots and spans from the rows. Order: as `runs`."""
        counts = np.array([run.count for run in runs], dtype=np.int64)
        starts = np.array([run.start for run in runs], dtype=np.int64)
        rows = np.array([run.row for run in runs], dtype=np.int64)
        query_start = np.zeros(len(runs) + 1, dtype=np.int64)
        np.cumsum(counts, out=query_start[1:])
        row_T = np.repeat(rows, counts)
        position_T = np.arange(query_start[-1]) - np.repeat(query_start[:-1] - starts, counts)
        kv_len = starts + counts
        row_T_dev, position_T_dev = upload(np.stack([row_T, position_T]), self.device)
        row_B, kv_len_B, start_B = upload(np.stack([rows, kv_len, query_start[1:]]), self.device)
        n_blocks = -(-int(kv_len.max()) // self.page_tokens)
        block_T = self.block_RW[row_T_dev, position_T_dev // self.page_tokens].to(torch.int64)
        query_start_B1 = torch.zeros(len(runs) + 1, dtype=torch.int32, device=self.device)
        query_start_B1[1:] = start_B
        return StepInputs(
            token_T=self.token_RC[row_T_dev, position_T_dev].to(torch.int64),
            position_T=position_T_dev,
            slot_T=block_T * self.page_tokens + position_T_dev % self.page_tokens,
            span=AttentionSpan(
                block_table_RW=self.block_RW[:, :n_blocks],
                row_B=row_B.to(torch.int32),
                query_start=tuple(query_start.tolist()),
                kv_len=tuple(kv_len.tolist()),
                kv_len_B=kv_len_B.to(torch.int32),
                query_start_B1=query_start_B1,
            ),
        )

    def append_tokens(self, row_S: Tensor, length_S: Tensor, token_S: Tensor) -> None:
        """Write each row's drawn token behind its `length_S` tokens."""
        self.token_RC[row_S, length_S] = token_S.to(torch.int32)

    def _start(self, start: RowStart) -> None:
        row = start.row
        self.token_RC[row, : len(start.token_ids)] = upload(start.token_ids, self.device, np.int32)
        self.block_RW[row, : len(start.block_ids)] = upload(start.block_ids, self.device, np.int32)
        self.sampling.write(row, start.n_prompt, start.sampling)
        self.row_sampling[row] = start.sampling
        self.n_prompt[row] = start.n_prompt
