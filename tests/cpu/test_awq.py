"""AWQ's searches against the same searches over tokens, in float64; folding against unchanged outputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.base.errors import BuildError
from sailfish.compress import fold
from sailfish.compress.awq import clip, output_error, search_scale
from sailfish.compress.rtn import quantise_int4, restore_int4

GROUP = 16


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _inputs(n_in: int) -> Tensor:
    """Return inputs of which a few are salient: an eighth of them, ten times the rest, in every group."""
    x_TI = _random(256, n_in) + 0.3 * _random(256, n_in) @ _random(n_in, n_in, seed=1) / n_in**0.5
    x_TI[:, ::8] *= 10
    return x_TI


def _hessian(x_TI: Tensor) -> Tensor:
    return x_TI.T @ x_TI / len(x_TI)


def _rounded(weight_OI: Tensor, search: bool = False) -> Tensor:
    code, scale, zero = quantise_int4(weight_OI, GROUP, search=search, dtype=torch.float32)
    return restore_int4(code, scale, zero, GROUP)


def _error(x_TI: Tensor, weight_OI: Tensor, restored_OI: Tensor) -> float:
    x_TI, weight_OI = x_TI.double(), weight_OI.double()
    y_TO = x_TI @ weight_OI.T
    return float((x_TI @ restored_OI.double().T - y_TO).square().sum() / y_TO.square().sum())


def test_the_error_of_the_hessian_is_that_of_the_tokens() -> None:
    """No tokens need to be kept."""
    x_TI, w_OI = _inputs(64), _random(24, 64, seed=2)
    error = output_error(w_OI, _rounded(w_OI), _hessian(x_TI))
    assert error == pytest.approx(_error(x_TI, w_OI, _rounded(w_OI)), rel=1e-4)
    assert output_error(w_OI, _rounded(w_OI), torch.zeros(64, 64)) == 0


def test_the_search_finds_the_scale_that_the_paper_would() -> None:
    """Equation 5: powers of the mean magnitude, each tried on the outputs of all tokens."""
    x_TI, weights = _inputs(64), [_random(24, 64, seed=2), _random(8, 64, seed=3)]
    magnitude_I = x_TI.abs().mean(0)
    found = search_scale(weights, _hessian(x_TI), magnitude_I, _rounded)
    joined, errors = torch.cat(weights), []
    for step in range(20):
        scale_I = magnitude_I ** (step / 20)
        scale_I = scale_I / (scale_I.max() * scale_I.min()).sqrt()
        errors.append(_error(x_TI / scale_I, joined * scale_I, _rounded(joined * scale_I)))
    assert found.alpha == errors.index(min(errors)) / 20
    assert found.error == pytest.approx(min(errors), rel=1e-4)
    assert found.error_before == pytest.approx(errors[0], rel=1e-4)
    assert found.error < 0.7 * found.error_before
    assert not found.is_duo


def test_the_weights_magnitude_is_tried_where_groups_are_named() -> None:
    """More candidates never end worse, and their error is that of the scales they return."""
    x_TI, w_OI = _inputs(64), _random(24, 64, seed=2) * _random(64, seed=4).exp()
    h_II, magnitude_I = _hessian(x_TI), x_TI.abs().mean(0)
    alone = search_scale([w_OI], h_II, magnitude_I, _rounded)
    duo = search_scale([w_OI], h_II, magnitude_I, _rounded, group=GROUP)
    assert duo.error <= alone.error
    restored = _rounded(w_OI * duo.scale_I) / duo.scale_I
    assert duo.error == pytest.approx(_error(x_TI, w_OI, restored), rel=1e-4)


def test_scales_are_such_as_the_producer_can_take() -> None:
    """The search judges the tied scales, not those it began with: two query heads of 32 share values."""
    x_TI, w_OI = _inputs(64), _random(24, 64, seed=2)
    x_TI[:, :32] *= 3
    found = search_scale(
        [w_OI], _hessian(x_TI), x_TI.abs().mean(0), _rounded, tied=lambda s: fold.share_over_queries(s, 2, 1)
    )
    torch.testing.assert_close(found.scale_I[:32], found.scale_I[32:])
    restored = _rounded(w_OI * found.scale_I) / found.scale_I
    assert found.error == pytest.approx(_error(x_TI, w_OI, restored), rel=1e-4)
    assert found.error < found.error_before


def test_inputs_that_are_always_zero_are_left_alone() -> None:
    """One of them, and all of them."""
    x_TI, w_OI = _inputs(64), _random(24, 64, seed=2)
    x_TI[:, 5] = 0
    found = search_scale([w_OI], _hessian(x_TI), x_TI.abs().mean(0), _rounded, group=GROUP)
    assert float(found.scale_I[5]) == 1.0 and found.error < found.error_before
    nothing = search_scale([w_OI], torch.zeros(64, 64), torch.zeros(64), _rounded, group=GROUP)
    assert nothing.error == 0 and torch.equal(nothing.scale_I, torch.ones(64))


@pytest.mark.parametrize("n_in", [64, 56])
def test_clipping_takes_each_groups_best_share_of_its_range(n_in: int) -> None:
    """Group by group and row by row on that group's part of the outputs; the last group may be shorter."""
    x_TI, w_OI = _inputs(n_in), _random(6, n_in, seed=2) ** 3
    clipped_OI = clip(w_OI, _hessian(x_TI), GROUP, _rounded)
    for start in range(0, n_in, GROUP):
        x_TJ = x_TI[:, start : start + GROUP].double()
        for row in range(6):
            w_J = w_OI[row, start : start + GROUP]
            errors = []
            for step in range(21):
                limit = w_J.abs().max() * (1 - 0.5 * step / 20)
                restored_J = _rounded(w_J.clamp(-limit, limit)[None])[0]
                errors.append(float((x_TJ @ (restored_J - w_J).double()).square().mean()))
            restored_J = _rounded(clipped_OI[row : row + 1, start : start + GROUP])[0]
            found = float((x_TJ @ (restored_J - w_J).double()).square().mean())
            assert found == pytest.approx(min(errors), rel=1e-3)


def test_clipping_helps_after_scaling_too() -> None:
    """As the method goes: scale, fold, then clip by the Hessian of the divided inputs."""
    x_TI, w_OI = _inputs(64), _random(24, 64, seed=2) ** 3
    h_II = _hessian(x_TI)
    found = search_scale([w_OI], h_II, x_TI.abs().mean(0), _rounded, group=GROUP)
    scaled_OI, scaled_II = fold.scale_inputs(w_OI, found.scale_I), fold.scale_hessian(h_II, found.scale_I)
    clipped_OI = clip(scaled_OI, scaled_II, GROUP, _rounded)
    error = _error(x_TI / found.scale_I, scaled_OI, _rounded(clipped_OI))
    assert error < found.error < found.error_before


def test_a_dense_block_gives_the_same_outputs_after_folding_what_the_search_found() -> None:
    """Norm into gate and up, up into down, in float64."""
    x_TD = _inputs(32).double()
    norm_D = (1 + 0.1 * _random(32, seed=5)).bfloat16()
    gate, up, down = (_random(*shape, seed=6).double() for shape in ((48, 32), (48, 32), (32, 48)))

    def block(norm_D: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed_TD = F.rms_norm(x_TD, (32,)) * norm_D.double()
        hidden_TI = F.silu(normed_TD @ gate.T) * (normed_TD @ up.T)
        return normed_TD, hidden_TI, hidden_TI @ down.T

    normed_TD, hidden_TI, before_TD = block(norm_D, gate, up, down)
    first = search_scale([gate, up], _hessian(normed_TD), normed_TD.abs().mean(0), _rounded, group=GROUP)
    second = search_scale([down], _hessian(hidden_TI), hidden_TI.abs().mean(0), _rounded, group=GROUP)
    assert first.error < first.error_before and second.error < second.error_before
    new_norm_D, _, scale_D = fold.divide_norm(norm_D, None, first.scale_I.double())
    new_up, _ = fold.divide_outputs(fold.scale_inputs(up, scale_D), None, second.scale_I.double())
    new_down = fold.scale_inputs(down, second.scale_I.double())
    after_TD = block(new_norm_D, fold.scale_inputs(gate, scale_D), new_up, new_down)[2]
    torch.testing.assert_close(after_TD, before_TD, rtol=1e-10, atol=1e-10)


def test_statistics_that_are_not_finite_are_refused() -> None:
    """In one line."""
    with pytest.raises(BuildError, match="not finite"):
        search_scale([torch.ones(2, 16)], torch.full((16, 16), torch.nan), torch.ones(16), _rounded)
