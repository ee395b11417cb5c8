"""Starts rows, builds a step's inputs and appends its draws on the CPU, from the kernels' own words.

In NumPy, on the tensors' own memory: for so few numbers an operation of torch takes three times as long.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sailfish.kernels.rows import Rows, StepTensors
from sailfish.kernels.step_words import (
    APPENDED_WORDS,
    RUN_WORDS,
    RUNS_AT,
    START_FIELDS,
    START_WORDS,
    StepLayout,
)

_FIRST_FLOAT = START_FIELDS.index("temperature")
_FIRST_SEED = START_FIELDS.index("seed_low")


def start_rows(words: Tensor, starts_at: int, n_starts: int, rows: Rows) -> None:
    """Write the rows that begin. words: int32. Mutates rows."""
    host = words.numpy()
    lists = (rows.token_RC, rows.block_RW, rows.barred_RS, rows.bias_id_RB)
    token_RC, block_RW, barred_RS, bias_id_RB = (column.numpy() for column in lists)
    columns = [getattr(rows, f"{name}_R").numpy() for name in _COLUMNS]
    bias_RB, penalties_R3, seed_R = rows.bias_RB.numpy(), rows.penalties_R3.numpy(), rows.seed_R.numpy()
    for i in range(n_starts):
        record = host[starts_at + i * START_WORDS : starts_at + (i + 1) * START_WORDS]
        numbers = record[_FIRST_FLOAT:].view(np.float32)
        start = dict(zip(START_FIELDS, (*record[:_FIRST_FLOAT].tolist(), *numbers.tolist()), strict=True))
        row = start["row"]
        _put(token_RC[row], host, start["tokens_at"], start["n_tokens"])
        _put(block_RW[row], host, start["blocks_at"], start["n_blocks"])
        _put(barred_RS[row], host, start["barred_at"], start["n_barred"])
        _put(bias_id_RB[row], host, start["bias_at"], start["n_bias"])
        _put(bias_RB[row], host.view(np.float32), start["bias_at"] + start["n_bias"], start["n_bias"])
        for name, column in zip(_COLUMNS, columns, strict=True):
            column[row] = start[name]
        seed_R[row] = record[_FIRST_SEED : _FIRST_SEED + 2].copy().view(np.int64)[0]
        penalties_R3[row] = numbers[-3:]


_COLUMNS = ("n_prompt", "n_barred", "n_bias", "top_k", "min_length", "temperature", "top_p", "min_p")


def build_inputs(
    words: Tensor, layout: StepLayout, rows: Rows, page_tokens: int, into_3T: Tensor | None = None
) -> StepTensors:
    """Append the blocks and return the step's inputs. words: int32. Mutates rows.block_RW.

    into_3T: int64, where tokens, positions and slots go; None: new memory.
    """
    host, block_RW = words.numpy(), rows.block_RW.numpy()
    if host[0]:
        appended = host[layout.appended_at : layout.appended_at + APPENDED_WORDS * host[0]]
        row_A, index_A, block_A = appended.reshape(-1, APPENDED_WORDS).T
        block_RW[row_A, index_A] = block_A
    row_B, start_B, query_start_B1 = _columns(host, layout)
    start_B = start_B[:-1]
    kv_len_B = start_B + np.diff(query_start_B1)
    if layout.is_decode:
        row_T, position_T = row_B[:-1], start_B.astype(np.int64)
    else:
        run_T = np.repeat(np.arange(layout.n_runs), np.diff(query_start_B1))
        row_T = row_B[run_T]
        position_T = np.arange(layout.n_tokens) + (start_B - query_start_B1[:-1])[run_T]
    at_T = np.maximum(position_T, 0)
    slots = block_RW[row_T, at_T // page_tokens].astype(np.int64) * page_tokens + at_T % page_tokens
    slots[position_T < 0] = -1
    row_S, length_S, at_S = row_B[:-1], kv_len_B, None
    if not layout.is_decode:
        run_S = host[layout.samples_at : layout.appended_at]
        at_S = torch.from_numpy(query_start_B1[1:][run_S].astype(np.int64) - 1)
        row_S, length_S = row_B[run_S], kv_len_B[run_S]
    made_3T = torch.from_numpy(np.stack((rows.token_RC.numpy()[row_T, at_T], at_T, slots)))
    token_T, position_T, slot_T = made_3T if into_3T is None else into_3T.copy_(made_3T)
    return StepTensors(
        token_T=token_T,
        position_T=position_T,
        slot_T=slot_T,
        row_B=torch.from_numpy(row_B[:-1]),
        kv_len_B=torch.from_numpy(kv_len_B),
        query_start_B1=torch.from_numpy(query_start_B1),
        at_S=at_S,
        row_S=torch.from_numpy(row_S),
        length_S=torch.from_numpy(length_S),
    )


def append_draws(
    tensors: StepTensors, token_S: Tensor, finite_S: Tensor, rows: Rows, drawn_S2: Tensor
) -> None:
    """Write each draw behind its row's tokens, and what the host reads: (token, is finite) as int32.

    Mutates rows.token_RC and the first S rows of drawn_S2.
    """
    drawn = drawn_S2.numpy()[: len(token_S)]
    drawn[:, 0] = token_S.numpy()
    drawn[:, 1] = finite_S.numpy()
    rows.token_RC.numpy()[tensors.row_S.numpy(), tensors.length_S.numpy()] = drawn[:, 0]


def _columns(host: NDArray[np.int32], layout: StepLayout) -> NDArray[np.int32]:
    """Return rows, starts and queries of the runs, each with the last record's; their own memory."""
    return host[RUNS_AT : layout.samples_at].reshape(-1, RUN_WORDS).T.copy()


def _put(column: NDArray[Any], values: NDArray[Any], at: int, n: int) -> None:
    column[:n] = values[at : at + n]
