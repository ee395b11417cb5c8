"""Launches the kernels that start rows, build a step's inputs and append its draws."""

from __future__ import annotations

import torch
from torch import Tensor

from sailfish.kernels.cuda.program import Variant, kernel, stream
from sailfish.kernels.rows import Rows, StepTensors
from sailfish.kernels.step_words import MAX_BARRED, MAX_BIAS, RUN_WORDS, RUNS_AT, StepLayout

_FILE = "step_inputs.cu"
_DEFINES = (("RUNS_AT", RUNS_AT), ("RUN_WORDS", RUN_WORDS))
_THREADS = 256
_COPY_BLOCKS = 4
VARIANTS = (Variant(_FILE, _DEFINES),)


def start_rows(words: Tensor, starts_at: int, n_starts: int, rows: Rows) -> None:
    """Write the rows that begin. words: int32, on the device. Mutates rows."""
    arguments = (
        *(words, starts_at, rows.token_RC, rows.token_RC.shape[1], rows.block_RW, rows.block_RW.shape[1]),
        *(rows.n_prompt_R, rows.temperature_R, rows.top_k_R, rows.top_p_R, rows.min_p_R, rows.seed_R),
        *(rows.penalties_R3, rows.min_length_R, rows.barred_RS, MAX_BARRED, rows.n_barred_R),
        *(rows.bias_id_RB, rows.bias_RB, MAX_BIAS, rows.n_bias_R),
    )
    kernel(_FILE, "start_rows", _DEFINES).launch((n_starts, _COPY_BLOCKS), _THREADS, arguments, stream())


def build_inputs(
    words: Tensor, layout: StepLayout, rows: Rows, page_tokens: int, into_3T: Tensor | None = None
) -> StepTensors:
    """Append the blocks and return the step's inputs. words: int32, on the device. Mutates rows.block_RW.

    into_3T: int64, where tokens, positions and slots go, each contiguous; None: new memory.
    """
    n_tokens, n_runs, n_samples = layout.n_tokens, layout.n_runs, layout.n_samples
    if into_3T is None:
        into_3T = torch.empty(3, n_tokens, dtype=torch.int64, device=words.device)
    assert into_3T.shape == (3, n_tokens) and into_3T.stride(1) == 1
    token_T, position_T, slot_T = into_3T
    row_B, kv_len_B, query_start_B1 = torch.empty(3, n_runs + 1, dtype=torch.int32, device=words.device)
    row_B, kv_len_B = row_B[:-1], kv_len_B[:-1]
    at_S, row_S, length_S = None, row_B, kv_len_B
    if not layout.is_decode:
        at_S = torch.empty(n_samples, dtype=torch.int64, device=words.device)
        row_S, length_S = torch.empty(2, n_samples, dtype=torch.int32, device=words.device)
    arguments = (
        *(words, n_runs, n_tokens, n_samples, layout.is_decode, rows.token_RC, rows.token_RC.shape[1]),
        *(rows.block_RW, rows.block_RW.shape[1], page_tokens, token_T, position_T, slot_T),
        *(row_B, kv_len_B, query_start_B1, at_S, row_S, length_S),
    )
    n_blocks = -(-max(n_tokens, n_runs + 1, n_samples) // _THREADS)
    kernel(_FILE, "build_inputs", _DEFINES).launch((n_blocks,), _THREADS, arguments, stream())
    return StepTensors(
        token_T=token_T,
        position_T=position_T,
        slot_T=slot_T,
        row_B=row_B,
        kv_len_B=kv_len_B,
        query_start_B1=query_start_B1,
        at_S=at_S,
        row_S=row_S,
        length_S=length_S,
    )


def append_draws(
    tensors: StepTensors, token_S: Tensor, finite_S: Tensor, rows: Rows, drawn_S2: Tensor
) -> None:
    """Write each draw behind its row's tokens, and what the host reads: (token, is finite) as int32.

    token_S: int64; finite_S: bool. Mutates rows.token_RC and the first S rows of drawn_S2.
    """
    n_samples = len(token_S)
    arguments = (
        *(token_S, finite_S, tensors.row_S, tensors.length_S, n_samples),
        *(rows.token_RC, rows.token_RC.shape[1], drawn_S2),
    )
    n_blocks = -(-n_samples // _THREADS)
    kernel(_FILE, "append_draws", _DEFINES).launch((n_blocks,), _THREADS, arguments, stream(), after=True)
