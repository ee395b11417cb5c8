"""How heads are dealt to threads where rotated heads are written."""

from __future__ import annotations

import pytest

from sailfish.kernels.cuda.elementwise import _PAIR_THREADS, _rope_launch


@pytest.mark.parametrize("n_tokens", [1, 37, 528, 529, 2048])
@pytest.mark.parametrize("heads", [(32, 8, 128), (6, 6, 64), (8, 1, 256), (14, 2, 32), (3, 1, 16)], ids=str)
def test_every_head_has_its_lanes_and_a_token_whole_warps(heads: tuple[int, int, int], n_tokens: int) -> None:
    """Lanes of a warp exchange what they hold: none of them may end before the others."""
    n_heads, n_kv_heads, head_dim = heads
    name, grid, threads, shape = _rope_launch(n_tokens, *heads, head_dim, False, 132)
    *_, n_lanes, n_parts = shape
    each = int(name.removeprefix("rope_write_pairs_"))
    assert threads == _PAIR_THREADS and n_lanes * 16 == head_dim
    assert n_parts * n_lanes % 32 == 0 and n_parts * each >= n_heads + 2 * n_kv_heads
    assert grid[0] * threads >= n_tokens * n_parts * n_lanes > (grid[0] - 1) * threads


@pytest.mark.parametrize(
    ("head_dim", "n_rotated", "interleaved"), [(80, 80, False), (128, 64, False), (128, 128, True)]
)
def test_other_layouts_are_turned_by_lanes_that_exchange(
    head_dim: int, n_rotated: int, interleaved: bool
) -> None:
    """Heads of an odd width, heads of which a part turns, and neighbours that turn together."""
    name, grid, threads, shape = _rope_launch(700, 32, 8, head_dim, n_rotated, interleaved, 132)
    each, n_lanes = int(name.removeprefix("rope_write_")), shape[3]
    assert grid[0] == 700 and n_lanes * 8 >= head_dim
    assert grid[1] * each * (threads // n_lanes) >= 48
