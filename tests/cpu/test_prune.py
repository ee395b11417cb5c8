"""Pruning against brute force over all masks, and against SparseGPT written down column by column."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sailfish.base.errors import BuildError, ConfigError
from sailfish.compress.joint import Int4Groups, Int8Rows
from sailfish.compress.prune import (
    Blocks,
    Pruned,
    Share,
    Sparsity,
    keep_mask,
    magnitude_mask,
    refit,
    sparsegpt,
    wanda_mask,
)
from sailfish.compress.rtn import restore_8, restore_int4

TWO_OF_FOUR = Blocks(2, 4)


def _inputs(n_in: int, n_tokens: int = 512, seed: int = 0) -> Tensor:
    """Return float64 inputs that depend on each other and differ in size."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_in, n_in, generator=random, dtype=torch.float64)
    size = torch.randn(n_in, generator=random, dtype=torch.float64).exp()
    x_TI = torch.randn(n_tokens, n_in, generator=random, dtype=torch.float64)
    return (x_TI + 0.5 * x_TI @ mix / n_in**0.5) * size


def _weight(n_out: int, n_in: int, seed: int = 1) -> Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _hessian(x_TI: Tensor) -> Tensor:
    return x_TI.T @ x_TI / len(x_TI)


def _error(weight_OI: Tensor, pruned_OI: Tensor, x_TI: Tensor) -> float:
    return float((x_TI @ (pruned_OI - weight_OI).T).square().mean())


def _masks(n: int, n_keep: int) -> Tensor:
    rows = [[i in kept for i in range(n)] for kept in itertools.combinations(range(n), n_keep)]
    return torch.tensor(rows)


def _textbook(w_OI: Tensor, h_II: Tensor, sparsity: Sparsity, block: int, damp_frac: float) -> Tensor:
    """SparseGPT as its section 3 derives it: the inverse of what is left of H is taken for each column."""
    salience_OI = w_OI**2 * h_II.diagonal()
    n_zeros_I = (salience_OI <= salience_OI.median()).sum(0)  # of half the weights, as ours takes it
    w_OI, n_in = w_OI.clone(), len(h_II)
    h_II = h_II + damp_frac * h_II.diagonal().mean() * torch.eye(n_in, dtype=h_II.dtype)
    left = [torch.linalg.inv(h_II[i:, i:]) for i in range(n_in)]
    size = torch.stack([inverse[0, 0] for inverse in left])
    keep_OI = torch.ones_like(w_OI, dtype=torch.bool)
    for i in range(n_in):
        width = sparsity.of if isinstance(sparsity, Blocks) else block
        if i % width == 0:
            score = (w_OI**2 / size)[:, i : i + width]
            if isinstance(sparsity, Blocks):
                for row, scores in enumerate(score):
                    for dropped in scores.argsort()[: width - sparsity.keep]:
                        keep_OI[row, i + dropped] = False
            else:
                ranked = score.flatten().sort().values
                keep_OI[:, i : i + width] = score > ranked[int(n_zeros_I[i : i + width].sum()) - 1]
        error_O = torch.where(keep_OI[:, i], 0.0, w_OI[:, i]) / left[i][0, 0]
        w_OI[:, i:] -= torch.outer(error_O, left[i][0])
    return torch.where(keep_OI, w_OI, 0.0)


@pytest.mark.parametrize("blocks", [Blocks(2, 4), Blocks(4, 8), Blocks(1, 4), Blocks(3, 4)])
def test_every_block_keeps_exactly_as_many_weights_as_it_should(blocks: Blocks) -> None:
    """Of equal weights too: a matrix of ones, and one of zeros."""
    weights = [
        _weight(6, 48),
        torch.ones(6, 48, dtype=torch.float64),
        torch.zeros(6, 48, dtype=torch.float64),
    ]
    h_II = _hessian(_inputs(48))
    for w_OI in weights:
        masks = [magnitude_mask(w_OI, blocks), wanda_mask(w_OI, h_II.diagonal(), blocks)]
        pruned = sparsegpt(w_OI, h_II, blocks, block=16)
        assert bool((pruned.weight_OI[~pruned.keep_OI] == 0).all())
        for mask in [*masks, pruned.keep_OI]:
            assert bool((mask.view(-1, blocks.of).sum(1) == blocks.keep).all())


@pytest.mark.parametrize("zeros_frac", [0.0, 0.3, 0.5, 0.77])
def test_a_share_of_zeros_is_exact_in_each_row_or_in_the_matrix(zeros_frac: float) -> None:
    """Of equal weights too; 50 columns are no multiple of SparseGPT's steps of 16."""
    share, h_II = Share(zeros_frac), _hessian(_inputs(50))
    for w_OI in (_weight(7, 50), torch.ones(7, 50, dtype=torch.float64)):
        assert int((~magnitude_mask(w_OI, share)).sum()) == round(zeros_frac * 350)
        assert ((~wanda_mask(w_OI, h_II.diagonal(), share)).sum(1) == round(zeros_frac * 50)).all()
        assert int((~sparsegpt(w_OI, h_II, share, block=16).keep_OI).sum()) == round(zeros_frac * 350)


def test_magnitude_loses_the_least_squares_of_all_masks() -> None:
    """All 70 masks of a row of 8 weights, and all 6 of a block of 4."""
    w_OI = _weight(1, 8)
    kept = (_masks(8, 4) * w_OI**2).sum(1).max()
    assert torch.equal((magnitude_mask(w_OI, Share(0.5)) * w_OI**2).sum(), kept)
    for block, mask in zip(w_OI.view(2, 4), magnitude_mask(w_OI, TWO_OF_FOUR).view(2, 4), strict=True):
        assert torch.equal((mask * block**2).sum(), (_masks(4, 2) * block**2).sum(1).max())


def test_wanda_errs_least_of_all_masks_on_inputs_that_are_independent() -> None:
    """There the error of a mask is the sum of its squared scores: measured on the outputs themselves."""
    x_TI = torch.linalg.qr(_inputs(8)).Q * torch.tensor([3, 1, 0.2, 5, 1, 0.5, 2, 0.1], dtype=torch.float64)
    w_OI = _weight(5, 8)
    mask_OI = wanda_mask(w_OI, x_TI.square().mean(0), Share(0.5))
    for w_I, mask_I in zip(w_OI, mask_OI, strict=True):
        errors = [_error(w_I[None], (w_I * mask)[None], x_TI) for mask in _masks(8, 4)]
        assert _error(w_I[None], (w_I * mask_I)[None], x_TI) == pytest.approx(min(errors), rel=1e-9)


@pytest.mark.parametrize("sparsity", [TWO_OF_FOUR, Blocks(4, 8), Share(0.5)])
def test_sparsegpt_is_the_textbooks(sparsity: Sparsity) -> None:
    """In float64 to the last digits, though that inverts for each column and knows no delayed updates."""
    w_OI, h_II = _weight(12, 64), _hessian(_inputs(64))
    pruned = sparsegpt(w_OI, h_II, sparsity, block=16)
    textbook_OI = _textbook(w_OI, h_II, sparsity, 16, 0.01)
    assert torch.equal(pruned.keep_OI, textbook_OI != 0)
    torch.testing.assert_close(pruned.weight_OI, textbook_OI, rtol=1e-9, atol=1e-12)


def test_zeros_are_taken_from_the_columns_that_weigh_little() -> None:
    """As many as are asked for, of inputs half of which are ten times as large; fewer are lost so."""
    x_TI = _inputs(64) * torch.tensor([1.0] * 32 + [10.0] * 32, dtype=torch.float64)
    w_OI = _weight(32, 64)
    keep_OI = sparsegpt(w_OI, _hessian(x_TI), Share(0.5), block=16).keep_OI
    assert int(keep_OI.sum()) == keep_OI.numel() // 2
    assert int(keep_OI[:, 32:].sum()) > 2 * int(keep_OI[:, :32].sum())


def test_blocks_do_not_depend_on_the_steps_of_the_walk() -> None:
    """Updates may be delayed, not lost."""
    w_OI, h_II = _weight(12, 64), _hessian(_inputs(64))
    one, other = (sparsegpt(w_OI, h_II, TWO_OF_FOUR, block=block) for block in (4, 128))
    torch.testing.assert_close(one.weight_OI, other.weight_OI, rtol=1e-9, atol=1e-12)


def test_kept_weights_behind_pruned_ones_are_those_of_least_squares() -> None:
    """No others give less error: the first two inputs are so small that their weights go."""
    x_TI = _inputs(4) * torch.tensor([0.1, 0.1, 1, 1], dtype=torch.float64)
    w_OI = _weight(6, 4).sign()
    pruned = sparsegpt(w_OI, _hessian(x_TI), TWO_OF_FOUR, damp_frac=0.0)
    assert bool((pruned.weight_OI[:, :2] == 0).all())
    fitted_IO = torch.linalg.lstsq(x_TI[:, 2:], x_TI @ w_OI.T).solution
    torch.testing.assert_close(pruned.weight_OI[:, 2:], fitted_IO.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sparsity", [TWO_OF_FOUR, Share(0.5)])
def test_refitted_weights_are_those_of_least_squares_and_zeros_stay(sparsity: Sparsity) -> None:
    """With a step for each kept weight conjugate gradients are there, but for what rounding takes."""
    x_TI, w_OI = _inputs(16), _weight(6, 16)
    keep_OI = wanda_mask(w_OI, _hessian(x_TI).diagonal(), sparsity)
    pruned = Pruned(weight_OI=w_OI * keep_OI, keep_OI=keep_OI, damp_frac=0.0)
    found_OI = refit(w_OI, pruned, _hessian(x_TI), n_steps=12)
    for w_I, keep_I, found_I in zip(w_OI, keep_OI, found_OI, strict=True):
        fitted = torch.linalg.lstsq(x_TI[:, keep_I], x_TI @ w_I).solution
        torch.testing.assert_close(found_I[keep_I], fitted, rtol=1e-6, atol=1e-6)
        assert bool((found_I[~keep_I] == 0).all())


@pytest.mark.parametrize("n_steps", [1, 3, 10])
def test_refitting_lowers_the_error_of_every_row_on_inputs_that_were_not_seen_too(n_steps: int) -> None:
    x_TI, w_OI = _inputs(64, n_tokens=4096), _weight(32, 64)
    seen, unseen = x_TI[:2048], x_TI[2048:]
    pruned = sparsegpt(w_OI, _hessian(seen), TWO_OF_FOUR)
    found_OI = refit(w_OI, pruned, _hessian(seen), n_steps)
    rows = zip(w_OI[:, None], pruned.weight_OI[:, None], found_OI[:, None], strict=True)
    assert all(_error(w, after, seen) <= 1.001 * _error(w, before, seen) for w, before, after in rows)
    assert _error(w_OI, found_OI, unseen) < 0.95 * _error(w_OI, pruned.weight_OI, unseen)


def test_inputs_that_were_never_seen_leave_refitted_weights_finite() -> None:
    w_OI, h_II = _weight(4, 8).float(), torch.zeros(8, 8)
    keep_OI = wanda_mask(w_OI, h_II.diagonal(), TWO_OF_FOUR)
    pruned = Pruned(weight_OI=w_OI * keep_OI, keep_OI=keep_OI, damp_frac=0.01)
    assert torch.equal(refit(w_OI, pruned, h_II), pruned.weight_OI)


def test_sparsegpt_comes_close_to_the_best_of_all_masks() -> None:
    """All 36 masks of two blocks, each with the weights of least squares, which nothing can beat."""
    ours = best = 0.0
    for seed in range(4):
        x_TI, w_OI = _inputs(8, seed=seed), _weight(4, 8, seed=seed + 10)
        ours += _error(w_OI, sparsegpt(w_OI, _hessian(x_TI), TWO_OF_FOUR, damp_frac=1e-6).weight_OI, x_TI)
        for w_I in w_OI:
            errors = []
            for left, right in itertools.product(_masks(4, 2), _masks(4, 2)):
                kept = torch.cat([left, right])
                fitted = torch.zeros_like(w_I)
                fitted[kept] = torch.linalg.lstsq(x_TI[:, kept], x_TI @ w_I).solution
                errors.append(_error(w_I[None], fitted[None], x_TI))
            best += min(errors) / len(w_OI)
    assert best <= ours < 2 * best


@pytest.mark.parametrize("sparsity", [TWO_OF_FOUR, Share(0.5)])
def test_the_more_is_known_of_the_inputs_the_less_is_lost(sparsity: Sparsity) -> None:
    """SparseGPT before Wanda before magnitude."""
    x_TI, w_OI = _inputs(64), _weight(32, 64)
    h_II = _hessian(x_TI)
    magnitude = _error(w_OI, w_OI * magnitude_mask(w_OI, sparsity), x_TI)
    wanda = _error(w_OI, w_OI * wanda_mask(w_OI, h_II.diagonal(), sparsity), x_TI)
    assert _error(w_OI, sparsegpt(w_OI, h_II, sparsity).weight_OI, x_TI) < wanda < magnitude


def test_a_weight_keeps_its_dtype_and_what_storing_it_rounds_is_made_good() -> None:
    """float32 would keep the same weights and round them to bfloat16 afterwards."""
    x_TI, w_OI = _inputs(64), _weight(32, 64).bfloat16()
    h_II = _hessian(x_TI).float()
    pruned = sparsegpt(w_OI, h_II, TWO_OF_FOUR)
    late = sparsegpt(w_OI.float(), h_II, TWO_OF_FOUR)
    assert pruned.weight_OI.dtype == torch.bfloat16
    assert bool((pruned.weight_OI[~pruned.keep_OI] == 0).all())
    exact = _error(w_OI.double(), late.weight_OI.double(), x_TI)
    assert _error(w_OI.double(), pruned.weight_OI.double(), x_TI) == pytest.approx(exact, rel=0.02)


def test_inputs_that_are_always_zero_lose_their_weights_first() -> None:
    """And the others lose fewer."""
    x_TI, w_OI = _inputs(32), _weight(8, 32)
    x_TI[:, [0, 1, 6, 9]] = 0
    pruned = sparsegpt(w_OI, _hessian(x_TI), TWO_OF_FOUR)
    assert bool((pruned.weight_OI[:, [0, 1, 6, 9]] == 0).all())
    torch.testing.assert_close(pruned.weight_OI[:, 2:4], w_OI[:, 2:4], rtol=0.2, atol=0.2)
    assert bool(pruned.keep_OI[:, 2:4].all())
    assert pruned.damp_frac == 0.01


def test_a_hessian_that_cannot_be_inverted_is_damped_more_and_it_is_said() -> None:
    """Five tokens say nothing of most of 32 directions."""
    h_II = _hessian(_inputs(32, n_tokens=5)).float()
    pruned = sparsegpt(_weight(8, 32).float(), h_II, TWO_OF_FOUR, damp_frac=0.0)
    assert 0 < pruned.damp_frac <= 1
    assert bool(pruned.weight_OI.isfinite().all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [8, 32, None])
def test_pruned_weights_in_four_bits_are_codes_and_scales_and_exact_zeros(
    group: int | None, symmetric: bool
) -> None:
    """The mask is obeyed after rounding, and the codes say exactly the weights that the walk left."""
    w_OI, h_II = _weight(16, 64).float(), _hessian(_inputs(64)).float()
    rounding = Int4Groups(group, symmetric)
    pruned = sparsegpt(w_OI, h_II, TWO_OF_FOUR, block=16, rounding=rounding)
    code_OI, scale_OG, zero_OG = rounding.codes(pruned.weight_OI)
    assert torch.equal(restore_int4(code_OI, scale_OG, zero_OG, group), pruned.weight_OI)
    assert scale_OG.shape == (16, 64 // (group or 64)) and scale_OG.dtype == torch.bfloat16
    assert bool((pruned.keep_OI.view(-1, 4).sum(1) == 2).all())
    assert bool((pruned.weight_OI[~pruned.keep_OI] == 0).all())


def test_pruned_weights_in_eight_bits_are_values_and_scales() -> None:
    """One scale a row."""
    w_OI, h_II = _weight(16, 64).float(), _hessian(_inputs(64)).float()
    rounding = Int8Rows()
    pruned = sparsegpt(w_OI, h_II, Share(0.5), block=16, rounding=rounding)
    assert torch.equal(restore_8(*rounding.codes(pruned.weight_OI)), pruned.weight_OI)
    assert int((~pruned.keep_OI).sum()) == 512


def test_rounding_while_pruning_loses_less_than_rounding_afterwards() -> None:
    """The columns behind make good both errors (SparseGPT, section 3.5)."""
    x_TI, w_OI = _inputs(64), _weight(32, 64).float()
    h_II = _hessian(x_TI).float()
    joint = sparsegpt(w_OI, h_II, TWO_OF_FOUR, rounding=Int4Groups(32)).weight_OI
    alone = sparsegpt(w_OI, h_II, TWO_OF_FOUR).weight_OI
    after = torch.empty_like(alone)
    for start in range(0, 64, 32):
        rounded = Int4Groups(None).fit(alone[:, start : start + 32])
        after[:, start : start + 32] = torch.stack([rounded(w) for w in alone[:, start : start + 32].T], 1)
    assert _error(w_OI, joint.double(), x_TI) < 0.98 * _error(w_OI, after.double(), x_TI)


def test_what_cannot_be_is_refused_in_a_line() -> None:
    """Sparsities, shapes, numbers."""
    w_OI, h_II = torch.ones(4, 30), torch.eye(30)
    for refused in (lambda: Share(1.0), lambda: Share(-0.1), lambda: Blocks(5, 4), lambda: Blocks(0, 4)):
        with pytest.raises(ConfigError):
            refused()
    with pytest.raises(ConfigError, match="row of 30 weights is not whole blocks of 4"):
        magnitude_mask(w_OI, TWO_OF_FOUR)
    with pytest.raises(ConfigError, match="row of 30 weights is not whole blocks of 4"):
        sparsegpt(w_OI, h_II, TWO_OF_FOUR)
    with pytest.raises(ConfigError, match="steps of 6 columns"):
        sparsegpt(torch.ones(4, 64), torch.eye(64), TWO_OF_FOUR, block=6)
    with pytest.raises(ConfigError, match="groups of 24"):
        sparsegpt(torch.ones(4, 64), torch.eye(64), TWO_OF_FOUR, block=16, rounding=Int4Groups(24))
    with pytest.raises(BuildError, match="not finite"):
        sparsegpt(w_OI * torch.nan, h_II, Share(0.5))
    with pytest.raises(BuildError, match="not numbers"):
        keep_mask(torch.tensor([[1.0, torch.nan]]), Share(0.5), "row")
    with pytest.raises(BuildError, match="not finite"):
        sparsegpt(w_OI, h_II * torch.inf, Share(0.5))
    with pytest.raises(BuildError, match="cannot be inverted"):
        sparsegpt(w_OI, -torch.eye(30), Share(0.5))
