"""Reads a linear layer in the layout of GPTQ checkpoints.

Codes lie 8 to an int32 word, lowest bits first: those of the weight along the inputs (qweight [I/8, O]),
zero points along the outputs (qzeros [G, O/8]). Input i belongs to group g_idx[i].
"""

from __future__ import annotations

import torch
from torch import Tensor

from sailfish.base.errors import CheckpointError, ConfigError
from sailfish.kernels.int4 import GROUPS, MIDDLE

_PER_WORD = 8
_LARGEST = 15


def read_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, *, zero_offset: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (code_OI uint8, scale_OG, zero_OG or None, order or None) as `int4.pack` takes them.

    `zero_offset` is what the stored zeros lack. zero_OG is None where all zeros are 8. With act-order the
    inputs of a group lie apart: order holds, for each column of code_OI, the input that it multiplies.
    """
    _check(qweight, qzeros, scales, g_idx)
    n_in, (n_groups, n_out) = len(qweight) * _PER_WORD, scales.shape
    group = _group(g_idx, n_in, n_groups)
    code_OI = _nibbles(qweight).permute(1, 0, 2).reshape(n_out, n_in)
    order = None if g_idx is None else _order(g_idx, group)
    if order is not None:
        code_OI = code_OI[:, order]
    scale_OG = scales.T
    zero_OG: Tensor | None = (_nibbles(qzeros).flatten(1).T + zero_offset) & _LARGEST
    assert zero_OG is not None
    parts = max(1, group // GROUPS[-1]) if n_groups > 1 else 1
    if parts > 1:  # several of the longest groups that kernels know, with the same scale
        n_parts = -(-n_in * parts // group)
        scale_OG, zero_OG = (x.repeat_interleave(parts, 1)[:, :n_parts] for x in (scale_OG, zero_OG))
    if bool((zero_OG == MIDDLE).all()):
        zero_OG = None
    return code_OI.contiguous(), scale_OG.contiguous(), zero_OG, order


def _check(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None) -> None:
    if qweight.dtype != torch.int32 or qzeros.dtype != torch.int32 or not scales.is_floating_point():
        raise CheckpointError(
            f"GPTQ tensors are int32, int32 and floats, not {qweight.dtype}, {qzeros.dtype}, {scales.dtype}"
        )
    shapes = [tuple(tensor.shape) for tensor in (qweight, qzeros, scales)]
    if any(len(shape) != 2 or 0 in shape for shape in shapes):
        raise CheckpointError(f"GPTQ tensors have two axes each, not the shapes {shapes}")
    n_groups, n_out = scales.shape
    if qweight.shape[1] != n_out or qzeros.shape != (n_groups, n_out // _PER_WORD) or n_out % _PER_WORD:
        raise CheckpointError(
            f"qweight {shapes[0]}, qzeros {shapes[1]} and scales {shapes[2]} do not fit each other",
            hint="they are (inputs / 8, outputs), (groups, outputs / 8) and (groups, outputs)",
        )
    if g_idx is not None and g_idx.shape != (len(qweight) * _PER_WORD,):
        raise CheckpointError(
            f"g_idx {tuple(g_idx.shape)} does not name a group for each of {len(qweight) * _PER_WORD} inputs"
        )


def _group(g_idx: Tensor | None, n_in: int, n_groups: int) -> int:
    """Return how many inputs share a scale: what g_idx says, else what fits the scales there are."""
    if n_groups == 1:
        return n_in
    said = None if g_idx is None else int((g_idx == 0).sum())
    group = GROUPS[0]
    while group < n_in:
        if -(-n_in // group) == n_groups and said in (None, group):
            return group
        group *= 2
    raise ConfigError(
        f"{n_groups} GPTQ groups of {n_in} inputs are not supported",
        hint=f"groups of {GROUPS[0]} inputs, twice as many and so on are, and whole rows",
    )


def _order(g_idx: Tensor, group: int) -> Tensor | None:
    """Return the inputs sorted by group, None where they are so already."""
    inputs = torch.arange(len(g_idx), device=g_idx.device)
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order].long(), inputs // group):
        raise CheckpointError(f"g_idx does not give {group} inputs to each group but the last")
    return None if torch.equal(order, inputs) else order


def _nibbles(words: Tensor) -> Tensor:
    """Return the 8 codes of each word, uint8, along a new last axis."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts & _LARGEST).to(torch.uint8)
