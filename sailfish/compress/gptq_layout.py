"""Reads a linear layer in the layout of GPTQ checkpoints from torch tensors, for the kernels of 4 bits.

The layout itself is `checkpoint.formats.gptq`'s; here the group size, which tensors alone do not state, is
found from their sizes, and groups longer than kernels know are cut into several with the same scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sailfish.base.errors import CheckpointError, ConfigError
from sailfish.checkpoint.formats.codec import read_linear
from sailfish.checkpoint.formats.scheme import LinearScheme
from sailfish.checkpoint.formats.tensors import StoredTensor
from sailfish.kernels.int4 import GROUPS

_PER_WORD = 8


def read_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, *, zero_offset: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (code_OI uint8, scale_OG, zero_OG or None, order or None) as `int4.pack` takes them.

    `zero_offset` is what the stored zeros lack. zero_OG is None where all zeros are 8. With act-order the
    inputs of a group lie apart: order holds, for each column of code_OI, the input that it multiplies.
    """
    _check(qweight, qzeros, scales, g_idx)
    n_in, n_groups = len(qweight) * _PER_WORD, len(scales)
    group = _group(g_idx, n_in, n_groups)
    scheme = LinearScheme(
        layout="gptq" if zero_offset else "gptq_v2",
        bits=4,
        strategy="group",
        group=group,
        symmetric=False,
        act_order=g_idx is not None,
    )
    whole = {"qweight": qweight, "qzeros": qzeros} | ({} if g_idx is None else {"g_idx": g_idx})
    stored = {name: StoredTensor(dtype="I32", array=x.cpu().int().numpy()) for name, x in whole.items()}
    stored["scales"] = StoredTensor(dtype="F32", array=scales.detach().cpu().float().numpy())
    linear = read_linear(stored, scheme, "the GPTQ layer")
    on = scales.device
    code_OI = torch.from_numpy(linear.code_OI).to(on)
    scale_OG, zero_OG = scales.T, None
    if linear.zero_OG is not None:
        zero_OG = torch.from_numpy(linear.zero_OG).to(on)
    order = None if linear.order is None else torch.from_numpy(linear.order).to(on)
    if order is not None:
        code_OI = code_OI[:, order]
    parts = max(1, group // GROUPS[-1]) if n_groups > 1 else 1
    if parts > 1:
        n_parts = -(-n_in * parts // group)
        scale_OG = scale_OG.repeat_interleave(parts, 1)[:, :n_parts]
        zero_OG = None if zero_OG is None else zero_OG.repeat_interleave(parts, 1)[:, :n_parts]
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
