"""Rows of drawing tokens from logits: greedy, at a temperature, and from the likeliest only."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from sailfish.bench.kernels.row import Calls, Row, n_copies
from sailfish.kernels.cuda.sampling import pick
from sailfish.kernels.rows import Rows

BATCHES = (1, 16, 64, 256)
_VOCABULARY = 128256
_CONTEXT = 512
WAYS: dict[str, dict[str, float]] = {
    "greedy": {},
    "temperature": {"temperature_R": 0.8},
    "top-k top-p": {"temperature_R": 0.8, "top_k_R": 50, "top_p_R": 0.95},
}
"""What each row's table is filled with; the rest asks for nothing."""


def sampling_rows(target: str) -> Iterator[Row]:
    """Yield the rows, and beside the greedy ones torch's arg-max."""
    for batch in BATCHES if target.startswith("sm_") else ():
        n_bytes = 2 * batch * _VOCABULARY
        for way in WAYS:
            yield Row(
                name=f"sample {way} B={batch}",
                implementation="pick",
                calls=partial(_calls, way, batch),
                n_bytes=n_bytes,
                entry="sailfish.kernels.cuda.sampling:pick",
            )
        yield Row(
            name=f"sample greedy B={batch} (torch)",
            is_chosen=False,
            implementation="torch",
            calls=partial(_torch_calls, batch),
            n_bytes=n_bytes,
        )


def _calls(way: str, batch: int) -> Calls:
    rows = Rows.empty(batch, _CONTEXT, 1, torch.device("cuda"))
    for name, value in WAYS[way].items():
        getattr(rows, name).fill_(value)
    row_S = torch.arange(batch, dtype=torch.int32, device="cuda")
    length_S = torch.full_like(row_S, _CONTEXT // 2)
    return [partial(pick, logits_SV, row_S, length_S, rows) for logits_SV in _logits(batch)]


def _torch_calls(batch: int) -> Calls:
    return [partial(torch.argmax, logits_SV, -1) for logits_SV in _logits(batch)]


def _logits(batch: int) -> list[torch.Tensor]:
    shape = (batch, _VOCABULARY)
    copies = min(n_copies(2 * batch * _VOCABULARY), 16)  # the head has just written them
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 4 for _ in range(copies)]
