"""The CPU's attention of single queries, at every level; prompts beside them go through torch."""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile

import pytest
import torch
from kernel_suite import DTYPES, attention, draw
from torch import Tensor

from sailfish.kernels.choose import choose
from sailfish.kernels.contract import AttentionSpan, Case, KvLayer
from sailfish.kernels.cpu import library
from sailfish.kernels.cpu.attention import attention as paged
from sailfish.kernels.reference.attention import attention as reference
from sailfish.kernels.table import OPS

ABSENT = library.unavailable()
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
Step = tuple[Tensor, KvLayer, AttentionSpan, float, int | None, None]
LENGTHS = {
    "one token": [(1, 1)],
    "around the tokens of a turn": [(1, n) for n in (2, 3, 5, 63, 64, 65, 67, 130, 300)],
    "prompts behind": [(1, 70), (1, 9), (7, 7), (3, 90)],
    "a prompt alone": [(20, 33)],
    "some with nothing to ask": [(1, 40), (0, 12), (5, 9)],
}
HEADS = [(6, 2, 16), (8, 1, 32), (5, 1, 64), (3, 3, 80), (2, 2, 256)]
CASE = Case(op="attention", target="cpu", dtype="bfloat16", kv_dtype="bfloat16", head_dim=64)


def step(
    lengths: list[tuple[int, int]], heads: tuple[int, int, int], dtype: str, window: int | None = None
) -> Step:
    """Return a step whose first sequences, as far as they have one query each, are said to."""
    q, kv, span, scale, *_ = attention(lengths, heads=heads)(draw(dtype, "cpu"))
    n_single = len(list(takewhile(lambda length: length[0] == 1, lengths)))
    return q, kv, replace(span, n_single=n_single), scale, window, None


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_pages_are_attended_to_where_they_lie(
    lengths: str, heads: tuple[int, int, int], dtype: str, level: str
) -> None:
    """Slots of nobody are NaN."""
    for window in (None, 4, 65):
        args = step(LENGTHS[lengths], heads, dtype, window)
        tolerance = OPS["attention"].tolerance[dtype]
        expected = reference(*args)
        torch.testing.assert_close(paged(*args, level=level), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("by", [1e4, -1e4])
def test_scores_of_any_size_neither_overflow_nor_vanish(by: float, level: str) -> None:
    q, *rest = step([(1, 200), (1, 3)], (4, 2, 16), "float32")
    args = (q * by, *rest)
    torch.testing.assert_close(paged(*args, level=level), reference(*args), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_sequence_of_nan_poisons_itself_and_no_other(poison: float) -> None:
    args = step([(1, 9), (1, 30), (1, 12)], (6, 2, 16), "float32")
    clean, (_, kv, span, *_) = reference(*args), args
    kv.v_NPKE[span.block_table_BW[0, :1].long()] = poison
    found = paged(*args)
    assert not found[0].isfinite().any()
    torch.testing.assert_close(found[1:], clean[1:], atol=1e-5, rtol=1e-5)


def test_a_row_that_only_pads_yields_zeros() -> None:
    q, kv, span, scale, window, softcap = step([(1, 9), (1, 5)], (6, 2, 16), "float32")
    span = replace(span, kv_len_B=torch.tensor([9, 0], dtype=torch.int32))
    assert (paged(q, kv, span, scale, window, softcap)[1] == 0).all()


def test_what_it_cannot_read_is_declined_in_words() -> None:
    assert choose(CASE).implementation == "cpu_paged"
    reasons = {
        "reads a cache in bfloat16, not int8": replace(CASE, kv_dtype="int8"),
        "heads are 24 wide, not a multiple of 16 up to 256": replace(CASE, head_dim=24),
        "heads are 512 wide, not a multiple of 16 up to 256": replace(CASE, head_dim=512),
        "prompts go through SDPA, which has no score soft-cap; the model needs 50": replace(
            CASE, softcap=50.0
        ),
        "made for the CPU, the target is sm_90": replace(CASE, target="sm_90"),
    }
    for reason, case in reasons.items():
        assert dict(choose(case).declined)["cpu_paged"] == reason
