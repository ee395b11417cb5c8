"""Draw one token per row from its logits, on the device.

Draws are Gumbel-max with a counter-based hash of (seed, position, token id): a row's token depends on
its own logits, seed and position only, never on the batch around it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sailfish.engine.step import RowSampling
from sailfish.engine.transfer import upload
from sailfish.kernels.rows import Rows
from sailfish.plan.memory import SAMPLER_CHUNK_ELEMENTS


def sample(
    logits_SV: Tensor,
    row_S: Tensor,
    length_S: Tensor,
    table: Rows,
    rows: list[RowSampling],
    row_ids: list[int],
    lengths: list[int],
    n_prompts: list[int],
) -> tuple[Tensor, Tensor]:
    """Return (token_S int64, finite_S bool). Mutates logits_SV.

    logits_SV: float32. row_S: table row of each sample. length_S: tokens before the drawn one (its
    position). The lists are the host's copies of the same facts: they decide which stages run at all, so
    that no stage reads the device.
    """
    finite_S = torch.isfinite(logits_SV.sum(dim=1))
    for i, row in enumerate(rows):  # one at a time bounds the workspace to a few rows of counts
        if row.repetition_penalty != 1.0 or row.presence_penalty != 0.0 or row.frequency_penalty != 0.0:
            _penalise(logits_SV[i], table.token_RC[row_ids[i], : lengths[i]], n_prompts[i], row)
    if any(r.logit_bias for r in rows):
        _add_biases(logits_SV, row_S, table)
    if any(n < p + r.min_tokens for r, n, p in zip(rows, lengths, n_prompts, strict=True)):
        _bar_ends(logits_SV, row_S, length_S, table)
    drawing = [i for i, r in enumerate(rows) if r.temperature > 0.0]
    step = max(1, SAMPLER_CHUNK_ELEMENTS // logits_SV.shape[1])
    token_S = logits_SV.argmax(dim=1)
    for begin in range(0, len(drawing), step):
        part = drawing[begin : begin + step]
        pick_b = upload(part, logits_SV.device)
        row_b = row_S[pick_b]
        scaled_bV = logits_SV[pick_b] / table.temperature_R[row_b, None]
        if any(
            rows[i].top_k < logits_SV.shape[1] or rows[i].top_p < 1.0 or rows[i].min_p > 0.0 for i in part
        ):
            _keep_likely(scaled_bV, row_b, table, [rows[i] for i in part])
        scaled_bV += gumbel(table.seed_R[row_b], length_S[pick_b], logits_SV.shape[1])
        token_S[pick_b] = scaled_bV.argmax(dim=1)
    return token_S, finite_S


def gumbel(seed_b: Tensor, position_b: Tensor, n_vocab: int) -> Tensor:
    """Return standard Gumbel noise [b, V] that is a pure function of (seed, position, token id).

    The generator is splitmix64's finaliser (Steele, Lea and Flood, 2014) over a counter.
    """
    base_b = _mix(_mix(seed_b) + position_b.long() * _GOLDEN)
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


def _ranks(list_RX: Tensor) -> Tensor:
    return torch.arange(list_RX.shape[1], device=list_RX.device)


def _add_biases(logits_SV: Tensor, row_S: Tensor, table: Rows) -> None:
    """Add each row's biases. Mutates logits_SV."""
    is_bias_SB = _ranks(table.bias_id_RB) < table.n_bias_R[row_S, None]
    bias_SB = torch.where(is_bias_SB, table.bias_RB[row_S], 0.0)
    logits_SV.scatter_add_(1, table.bias_id_RB[row_S].long(), bias_SB)


def _bar_ends(logits_SV: Tensor, row_S: Tensor, length_S: Tensor, table: Rows) -> None:
    """Set to -inf what would end a row before its least length. Mutates logits_SV."""
    is_early_S1 = (length_S < table.min_length_R[row_S])[:, None]
    is_barred_SS = is_early_S1 & (_ranks(table.barred_RS) < table.n_barred_R[row_S, None])
    bar_SS = torch.where(is_barred_SS, -torch.inf, 0.0)
    logits_SV.scatter_add_(1, table.barred_RS[row_S].long(), bar_SS)


def _penalise(logit_V: Tensor, token_c: Tensor, n_prompt: int, row: RowSampling) -> None:
    """Lower the logits of tokens already there. token_c: the row's prompt and output. Mutates logit_V."""
    token_c = token_c.to(torch.int64)
    ones_c = torch.ones(token_c.shape, device=logit_V.device)
    seen_V = torch.zeros_like(logit_V).scatter_(0, token_c, ones_c) > 0
    count_V = torch.zeros_like(logit_V).scatter_add_(0, token_c[n_prompt:], ones_c[n_prompt:])
    repeated_V = torch.where(logit_V > 0, logit_V / row.repetition_penalty, logit_V * row.repetition_penalty)
    logit_V.copy_(torch.where(seen_V, repeated_V, logit_V))
    logit_V -= row.frequency_penalty * count_V + row.presence_penalty * (count_V > 0)


def _keep_likely(scaled_bV: Tensor, row_b: Tensor, table: Rows, rows: list[RowSampling]) -> None:
    """Set to -inf what top_k, then top_p, then min_p exclude. Mutates scaled_bV."""
    n_vocab = scaled_bV.shape[1]
    limited = [r.top_k for r in rows if r.top_k < n_vocab]
    if limited:
        best_bk = scaled_bV.topk(max(limited), dim=1).values
        kth_b1 = best_bk.gather(1, (table.top_k_R[row_b, None].long() - 1).clamp(max=max(limited) - 1))
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
