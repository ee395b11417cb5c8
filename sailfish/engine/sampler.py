"""Draw one token per row from its logits, on the device.

Draws are Gumbel-max with a counter-based hash of (seed, position, token id): a row's token depends on
its own logits, seed and position only, never on the batch around it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sailfish.engine.api import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from sailfish.engine.step import RowSampling
from sailfish.engine.transfer import upload
from sailfish.plan.memory import SAMPLER_CHUNK_ELEMENTS

MAX_BARRED = MAX_STOP_TOKEN_IDS + 16
"""Stop tokens of a request and end-of-text tokens of its model."""


@dataclass(slots=True)
class SamplingTable:
    """Sampling parameters of every row (R), resident on the device."""

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor
    seed_R: Tensor
    min_length_R: Tensor
    barred_RS: Tensor
    """Token ids that may not be drawn before min_length; the first n_barred of a row count."""
    n_barred_R: Tensor
    rank_S: Tensor
    """0 .. MAX_BARRED - 1."""
    bias_id_RB: Tensor
    bias_RB: Tensor
    has_bias: list[bool]
    """Host copy: rows whose bias columns are not all zero."""

    @classmethod
    def empty(cls, n_rows: int, device: torch.device) -> SamplingTable:
        """Allocate a table of neutral rows."""

        def floats(value: float) -> Tensor:
            return torch.full((n_rows,), value, dtype=torch.float32, device=device)

        def ints() -> Tensor:
            return torch.zeros(n_rows, dtype=torch.int64, device=device)

        return cls(
            temperature_R=floats(0.0),
            top_k_R=ints(),
            top_p_R=floats(1.0),
            min_p_R=floats(0.0),
            seed_R=ints(),
            min_length_R=ints(),
            barred_RS=torch.zeros(n_rows, MAX_BARRED, dtype=torch.int64, device=device),
            n_barred_R=ints(),
            rank_S=torch.arange(MAX_BARRED, device=device),
            bias_id_RB=torch.zeros(n_rows, MAX_LOGIT_BIAS, dtype=torch.int64, device=device),
            bias_RB=torch.zeros(n_rows, MAX_LOGIT_BIAS, dtype=torch.float32, device=device),
            has_bias=[False] * n_rows,
        )

    def write(self, row: int, n_prompt: int, sampling: RowSampling) -> None:
        """Set one row. Mutates every column of it."""
        self.temperature_R[row] = sampling.temperature
        self.top_k_R[row] = sampling.top_k
        self.top_p_R[row] = sampling.top_p
        self.min_p_R[row] = sampling.min_p
        self.seed_R[row] = sampling.seed
        self.min_length_R[row] = n_prompt + sampling.min_tokens
        n_barred = len(sampling.stop_token_ids)
        self.n_barred_R[row] = n_barred
        if n_barred:
            self.barred_RS[row, :n_barred] = upload(sampling.stop_token_ids, self.rank_S.device)
        n_bias = len(sampling.logit_bias)
        if n_bias or self.has_bias[row]:
            self.has_bias[row] = n_bias > 0
            self.bias_RB[row].zero_()  # an unused entry adds zero
        if n_bias:
            ids, biases = zip(*sampling.logit_bias, strict=True)
            self.bias_id_RB[row, :n_bias] = upload(ids, self.rank_S.device)
            self.bias_RB[row, :n_bias] = upload(biases, self.rank_S.device, np.float32)


def sample(
    logits_SV: Tensor,
    row_S: Tensor,
    length_S: Tensor,
    token_RC: Tensor,
    table: SamplingTable,
    rows: list[RowSampling],
    row_ids: list[int],
    lengths: list[int],
    n_prompts: list[int],
) -> tuple[Tensor, Tensor]:
    """Return (token_S int64, finite_S bool). Mutates logits_SV.

    logits_SV: float32. row_S: table row of each sample. length_S: tokens before the drawn one (its
    position). token_RC: the device's token table. The lists are the host's copies
    of the same facts: they decide which stages run at all, so that no stage reads the device.
    """
    finite_S = torch.isfinite(logits_SV.sum(dim=1))
    penalised = [i for i, r in enumerate(rows) if _is_penalised(r)]
    if penalised:
        for i in penalised:  # one row at a time bounds the workspace to a few rows of counts
            _penalise(logits_SV[i], token_RC[row_ids[i], : lengths[i]], n_prompts[i], rows[i])
    if any(r.logit_bias for r in rows):
        logits_SV.scatter_add_(1, table.bias_id_RB[row_S], table.bias_RB[row_S])
    if any(n < p + r.min_tokens for r, n, p in zip(rows, lengths, n_prompts, strict=True)):
        is_early_S1 = (length_S < table.min_length_R[row_S])[:, None]
        barred_SS = table.barred_RS[row_S]
        is_barred_SS = is_early_S1 & (table.rank_S[None, :] < table.n_barred_R[row_S, None])
        logits_SV.scatter_add_(1, barred_SS, torch.where(is_barred_SS, -torch.inf, 0.0))
    drawing = [i for i, r in enumerate(rows) if r.temperature > 0.0]
    if not drawing:
        return logits_SV.argmax(dim=1), finite_S
    step = max(1, SAMPLER_CHUNK_ELEMENTS // logits_SV.shape[1])
    token_S = logits_SV.argmax(dim=1)
    for begin in range(0, len(drawing), step):
        part = drawing[begin : begin + step]
        pick_b = upload(part, logits_SV.device)
        row_b = row_S[pick_b]
        scaled_bV = logits_SV[pick_b] / table.temperature_R[row_b, None]
        _keep_likely(scaled_bV, row_b, table, [rows[i] for i in part])
        scaled_bV += gumbel(table.seed_R[row_b], length_S[pick_b], logits_SV.shape[1])
        token_S[pick_b] = scaled_bV.argmax(dim=1)
    return token_S, finite_S


def gumbel(seed_b: Tensor, position_b: Tensor, n_vocab: int) -> Tensor:
    """Return standard Gumbel noise [b, V] that is a pure function of (seed, position, token id).

    The generator is splitmix64's finaliser (Steele, Lea and Flood, 2014) over a counter.
    """
    base_b = _mix(_mix(seed_b) + position_b * _GOLDEN)
    ids_V = torch.arange(n_vocab, dtype=torch.int64, device=seed_b.device)
    bits_bV = _mix(base_b[:, None] + ids_V[None, :] * _GOLDEN)
    return _to_gumbel(bits_bV)


def _to_gumbel(bits: Tensor) -> Tensor:
    """Turn random 64-bit integers into Gumbel noise that is always finite.

    23 bits and a half are exact in float32, so that no uniform number is rounded to 0 or 1.
    """
    uniform = ((bits >> 41) & 0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def top_logprobs(logits_bV: Tensor, chosen_b: Tensor, n_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logprob of chosen_b, top logprobs [b, n_top], their ids [b, n_top]) of raw logits."""
    logprob_bV = torch.log_softmax(logits_bV, dim=1)
    chosen = logprob_bV.gather(1, chosen_b[:, None])[:, 0]
    top, top_id = logprob_bV.topk(n_top, dim=1)
    return chosen, top, top_id


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _is_penalised(row: RowSampling) -> bool:
    return row.repetition_penalty != 1.0 or row.presence_penalty != 0.0 or row.frequency_penalty != 0.0


def _penalise(logit_V: Tensor, token_c: Tensor, n_prompt: int, row: RowSampling) -> None:
    """Lower the logits of tokens already there. token_c: the row's prompt and output. Mutates logit_V."""
    token_c = token_c.to(torch.int64)
    ones_c = torch.ones(token_c.shape, device=logit_V.device)
    seen_V = torch.zeros_like(logit_V).scatter_(0, token_c, ones_c) > 0
    count_V = torch.zeros_like(logit_V).scatter_add_(0, token_c[n_prompt:], ones_c[n_prompt:])
    repeated_V = torch.where(logit_V > 0, logit_V / row.repetition_penalty, logit_V * row.repetition_penalty)
    logit_V.copy_(torch.where(seen_V, repeated_V, logit_V))
    logit_V -= row.frequency_penalty * count_V + row.presence_penalty * (count_V > 0)


def _keep_likely(scaled_bV: Tensor, row_b: Tensor, table: SamplingTable, rows: list[RowSampling]) -> None:
    """Set to -inf what top_k, then top_p, then min_p exclude. Mutates scaled_bV."""
    n_vocab = scaled_bV.shape[1]
    limited = [r.top_k for r in rows if r.top_k < n_vocab]
    if limited:
        best_bk = scaled_bV.topk(max(limited), dim=1).values
        kth_b1 = best_bk.gather(1, (table.top_k_R[row_b, None] - 1).clamp(max=max(limited) - 1))
        is_free_b1 = table.top_k_R[row_b, None] >= n_vocab
        scaled_bV.masked_fill_((scaled_bV < kth_b1) & ~is_free_b1, -torch.inf)
    if any(r.top_p < 1.0 for r in rows):
        order_bV = scaled_bV.sort(dim=1, descending=True).values
        before_bV = order_bV.softmax(dim=1).cumsum(dim=1).roll(1, dims=1)
        before_bV[:, 0] = 0.0
        n_kept_b1 = (before_bV < table.top_p_R[row_b, None]).sum(dim=1, keepdim=True)
        smallest_b1 = order_bV.gather(1, n_kept_b1 - 1)
        is_cut_b1 = table.top_p_R[row_b, None] < 1.0
        scaled_bV.masked_fill_((scaled_bV < smallest_b1) & is_cut_b1, -torch.inf)
    if any(r.min_p > 0.0 for r in rows):
        floor_b1 = scaled_bV.amax(dim=1, keepdim=True) + table.min_p_R[row_b, None].log()
        scaled_bV.masked_fill_(scaled_bV < floor_b1, -torch.inf)
