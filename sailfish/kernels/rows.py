"""What the device keeps of each row of the batch, and what a step's kernels make of it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sailfish.kernels.step_words import MAX_BARRED, MAX_BIAS


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Tokens, blocks and sampling parameters of every row (R), resident on the device."""

    token_RC: Tensor
    """int32: the prompt, then what was drawn."""
    block_RW: Tensor
    """int32: block ids in position order."""
    n_prompt_R: Tensor
    """int32."""
    temperature_R: Tensor
    """float32, as all that is no count and no id; 0: the likeliest token."""
    top_k_R: Tensor
    """int32; the vocabulary size when not limited."""
    top_p_R: Tensor
    min_p_R: Tensor
    seed_R: Tensor
    """int64."""
    penalties_R3: Tensor
    """Repetition, presence, frequency."""
    min_length_R: Tensor
    """int32: a row that is shorter may not draw its barred tokens."""
    barred_RS: Tensor
    """int32; the first n_barred of a row count."""
    n_barred_R: Tensor
    """int32."""
    bias_id_RB: Tensor
    """int32, distinct; the first n_bias of a row count."""
    bias_RB: Tensor
    n_bias_R: Tensor
    """int32."""

    @classmethod
    def empty(cls, n_rows: int, n_positions: int, n_blocks: int, device: torch.device) -> Rows:
        """Allocate rows that draw the likeliest token and change no logit."""

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def floats(value: float, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.float32, device=device)

        return cls(
            token_RC=ints(n_rows, n_positions),
            block_RW=ints(n_rows, n_blocks),
            n_prompt_R=ints(n_rows),
            temperature_R=floats(0.0, n_rows),
            top_k_R=ints(n_rows).fill_(torch.iinfo(torch.int32).max),
            top_p_R=floats(1.0, n_rows),
            min_p_R=floats(0.0, n_rows),
            seed_R=torch.zeros(n_rows, dtype=torch.int64, device=device),
            penalties_R3=torch.tensor([1.0, 0.0, 0.0], device=device).repeat(n_rows, 1),
            min_length_R=ints(n_rows),
            barred_RS=ints(n_rows, MAX_BARRED),
            n_barred_R=ints(n_rows),
            bias_id_RB=ints(n_rows, MAX_BIAS),
            bias_RB=floats(0.0, n_rows, MAX_BIAS),
            n_bias_R=ints(n_rows),
        )

    @property
    def n_bytes(self) -> int:
        """Device memory of all rows, in bytes."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTensors:
    """The inputs of one step, made on the device from its words and the rows."""

    token_T: Tensor
    """int64."""
    position_T: Tensor
    """int64."""
    slot_T: Tensor
    """int64, block * P + offset; -1 where there is no token."""
    row_B: Tensor
    """int32."""
    kv_len_B: Tensor
    """int32: tokens of each run's row, the run's own included."""
    query_start_B1: Tensor
    """int32."""
    at_S: Tensor | None
    """int64: the token behind which each sample is drawn; None: every token is."""
    row_S: Tensor
    """int32: the row of each sample."""
    length_S: Tensor
    """int32: tokens before the drawn one, which is its position."""
