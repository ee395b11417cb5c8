"""Starts rows, builds a step's inputs and appends its draws in plain torch, from the kernels' own words."""

from __future__ import annotations

import numpy as np
import torch
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
    host = words.cpu().numpy()
    device = rows.token_RC.device
    for i in range(n_starts):
        record = host[starts_at + i * START_WORDS : starts_at + (i + 1) * START_WORDS]
        start = dict(zip(START_FIELDS, record[:_FIRST_FLOAT].tolist(), strict=False))
        numbers = torch.from_numpy(record[_FIRST_FLOAT:].view(np.float32).copy())
        row = start["row"]
        for column, values in (
            (rows.token_RC, _part(host, start, "tokens")),
            (rows.block_RW, _part(host, start, "blocks")),
            (rows.barred_RS, _part(host, start, "barred")),
            (rows.bias_id_RB, _part(host, start, "bias")),
            (rows.bias_RB, _part(host, start, "bias", skip=start["n_bias"]).view(np.float32)),
        ):
            column[row, : len(values)] = torch.from_numpy(values.copy()).to(device)
        rows.n_prompt_R[row] = start["n_prompt"]
        rows.n_barred_R[row] = start["n_barred"]
        rows.n_bias_R[row] = start["n_bias"]
        rows.top_k_R[row] = start["top_k"]
        rows.min_length_R[row] = start["min_length"]
        rows.seed_R[row] = int(record[_FIRST_SEED : _FIRST_SEED + 2].copy().view(np.int64)[0])
        rows.temperature_R[row], rows.top_p_R[row], rows.min_p_R[row] = numbers[:3]
        rows.penalties_R3[row] = numbers[3:].to(device)


def build_inputs(words: Tensor, layout: StepLayout, rows: Rows, page_tokens: int) -> StepTensors:
    """Append the blocks and return the step's inputs. words: int32. Mutates rows.block_RW."""
    appended = words[layout.appended_at : layout.appended_at + APPENDED_WORDS * int(words[0])]
    row_A, index_A, block_A = appended.view(-1, APPENDED_WORDS).T
    rows.block_RW[row_A, index_A] = block_A
    run_words = words[RUNS_AT : layout.samples_at].view(-1, RUN_WORDS)
    row_B, start_B = run_words[:-1, 0], run_words[:-1, 1]
    query_start_B1 = run_words[:, 2]
    count_B = query_start_B1.diff()
    kv_len_B = start_B + count_B
    if layout.is_decode:
        row_T, position_T = row_B, start_B.long()
    else:
        run_T = torch.repeat_interleave(count_B, output_size=layout.n_tokens)
        row_T = row_B[run_T]
        first_T = (start_B - query_start_B1[:-1])[run_T]
        position_T = torch.arange(layout.n_tokens, device=words.device) + first_T
    real_T = position_T >= 0
    position_T = position_T.clamp(min=0)
    slot_T = rows.block_RW[row_T, position_T // page_tokens].long() * page_tokens + position_T % page_tokens
    at_S, row_S, length_S = None, row_B, kv_len_B
    if not layout.is_decode:
        run_S = words[layout.samples_at : layout.appended_at]
        at_S, row_S, length_S = query_start_B1[1:][run_S].long() - 1, row_B[run_S], kv_len_B[run_S]
    return StepTensors(
        token_T=rows.token_RC[row_T, position_T].long(),
        position_T=position_T,
        slot_T=torch.where(real_T, slot_T, -1),
        row_B=row_B.contiguous(),
        kv_len_B=kv_len_B,
        query_start_B1=query_start_B1.contiguous(),
        at_S=at_S,
        row_S=row_S,
        length_S=length_S,
    )


def append_draws(
    tensors: StepTensors, token_S: Tensor, finite_S: Tensor, rows: Rows, drawn_S2: Tensor
) -> None:
    """Write each draw behind its row's tokens, and what the host reads: (token, is finite) as int32.

    Mutates rows.token_RC and the first S rows of drawn_S2.
    """
    rows.token_RC[tensors.row_S, tensors.length_S] = token_S.to(torch.int32)
    drawn_S2[: len(token_S), 0] = token_S
    drawn_S2[: len(token_S), 1] = finite_S


def _part(host: np.ndarray, start: dict[str, int], name: str, skip: int = 0) -> np.ndarray:
    begin = start[f"{name}_at"] + skip
    return host[begin : begin + start[f"n_{name}"]]
