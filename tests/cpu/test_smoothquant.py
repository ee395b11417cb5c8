"""SmoothQuant against its formula, folding against unchanged outputs, static scales against brute force."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.base.errors import BuildError, ConfigError
from sailfish.compress import fold
from sailfish.compress.recipe import Static
from sailfish.compress.rtn import Format8, quantise_8
from sailfish.compress.smoothquant import ALPHAS, round_tokens, search_smooth, smooth_scale
from sailfish.compress.static_scale import Magnitudes, static_scale


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _outliers(n_tokens: int, n_in: int) -> Tensor:
    """Return inputs of which two channels are much larger than the rest, as in large models."""
    x_TI = _random(n_tokens, n_in)
    x_TI[:, [3, n_in - 5]] *= 60
    return x_TI


def _rms_norm(x_TD: Tensor, weight_D: Tensor, plus_one: bool) -> Tensor:
    normed = x_TD / (x_TD.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return normed * (weight_D.to(x_TD.dtype) + (1 if plus_one else 0))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_scales_are_those_of_the_formula(alpha: float) -> None:
    """Equation 4, channel by channel; channels that are never used are left alone."""
    x_TI, weights = _outliers(40, 16), [_random(6, 16, seed=1), _random(3, 16, seed=2)]
    x_TI[:, 7] = 0
    for weight in weights:
        weight[:, 9] = 0
    scale_I = smooth_scale(x_TI.abs().amax(0), weights, alpha)
    for i in range(16):
        x = max(abs(float(row[i])) for row in x_TI)
        w = max(abs(float(row[i])) for weight in weights for row in weight)
        expected = x**alpha / w ** (1 - alpha) if x and w else 1.0
        assert float(scale_I[i]) == pytest.approx(expected, rel=1e-5)


def test_at_one_half_activations_and_weights_are_equally_hard() -> None:
    """Section 4: both reach the same in every channel."""
    x_TI, w_OI = _outliers(40, 16).float(), _random(6, 16, seed=1).float()
    scale_I = smooth_scale(x_TI.abs().amax(0), [w_OI], 0.5)
    torch.testing.assert_close((x_TI / scale_I).abs().amax(0), (w_OI * scale_I).abs().amax(0))


@pytest.mark.parametrize("plus_one", [False, True])
def test_folding_into_a_norm_leaves_the_outputs_as_they_were(plus_one: bool) -> None:
    """To float64's digits, though the norm is stored in bfloat16: the consumers make its rounding good."""
    x_TD, weight_D = _random(20, 64), _random(64, seed=1).bfloat16()
    weight_D[5] = -1.0 if plus_one else 0.0  # a channel that is switched off
    bias_D = _random(64, seed=3)
    w_OI = _random(32, 64, seed=2)
    folded_D, folded_bias_D, scale_D = fold.divide_norm(
        weight_D, bias_D, _random(64, seed=4).exp(), plus_one=plus_one
    )
    assert folded_D.dtype == torch.bfloat16 and folded_bias_D is not None
    before = (_rms_norm(x_TD, weight_D, plus_one) + bias_D) @ w_OI.T
    after = (_rms_norm(x_TD, folded_D, plus_one) + folded_bias_D) @ fold.scale_inputs(w_OI, scale_D).T
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)


def test_a_norm_too_small_to_be_divided_is_left_alone() -> None:
    """Its channel would vanish from bfloat16."""
    weight_D = torch.tensor([1e-38, 1.0], dtype=torch.bfloat16)
    folded_D, _, scale_D = fold.divide_norm(weight_D, None, torch.tensor([1e5, 2.0]))
    assert torch.equal(folded_D, torch.tensor([1e-38, 0.5], dtype=torch.bfloat16))
    assert torch.equal(scale_D, torch.tensor([1.0, 2.0]))


def test_folding_into_up_leaves_a_gated_mlp_as_it_was() -> None:
    """The gate is not touched."""
    x_TD = _random(20, 32)
    gate, up, down = _random(48, 32, seed=1), _random(48, 32, seed=2), _random(32, 48, seed=3)
    bias = _random(48, seed=4)
    scale_I = _random(48, seed=5).exp()
    new_up, new_bias = fold.divide_outputs(up, bias, scale_I)
    assert new_bias is not None
    before = (F.silu(x_TD @ gate.T) * (x_TD @ up.T + bias)) @ down.T
    hidden_TI = F.silu(x_TD @ gate.T) * (x_TD @ new_up.T + new_bias)
    torch.testing.assert_close(hidden_TI @ fold.scale_inputs(down, scale_I).T, before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_folding_into_values_leaves_grouped_query_attention_as_it_was(n_heads: int, n_kv_heads: int) -> None:
    """Query heads that read the same values share their scales."""
    width, x_TD = 8, _random(20, 32)
    q, k, v = (_random(n * width, 32, seed=n) for n in (n_heads, n_kv_heads, n_kv_heads + 10))
    v, out = _random(n_kv_heads * width, 32, seed=7), _random(32, n_heads * width, seed=8)

    def attention(v_OI: Tensor, out_OI: Tensor) -> Tensor:
        q_HTE, k_HTE, v_HTE = ((x_TD @ w.T).view(20, -1, width).transpose(0, 1) for w in (q, k, v_OI))
        mixed = F.scaled_dot_product_attention(q_HTE, k_HTE, v_HTE, is_causal=True, enable_gqa=True)
        return mixed.transpose(0, 1).reshape(20, -1) @ out_OI.T

    scale_I = fold.share_over_queries(_random(n_heads * width, seed=9).exp(), n_heads, n_kv_heads)
    new_v, _ = fold.divide_outputs(v, None, fold.of_values(scale_I, n_heads, n_kv_heads))
    after = attention(new_v, fold.scale_inputs(out, scale_I))
    torch.testing.assert_close(after, attention(v, out), rtol=1e-10, atol=1e-10)


def test_a_hessian_is_scaled_as_its_inputs_are() -> None:
    """Mean of x x^T."""
    x_TI, scale_I = _random(50, 8), _random(8, seed=1).exp()
    divided_TI = x_TI / scale_I
    torch.testing.assert_close(
        fold.scale_hessian(x_TI.T @ x_TI / 50, scale_I), divided_TI.T @ divided_TI / 50
    )


def test_the_search_takes_the_migration_that_errs_least_in_whole_numbers() -> None:
    """Measured with int8 matrices, row by row in float64, for each alpha."""
    x_TI, w_OI = _outliers(64, 32).float(), _random(24, 32, seed=1).float()
    found = search_smooth(x_TI, [w_OI])
    exact_TO = x_TI.double() @ w_OI.double().T

    def error(scale_I: Tensor) -> float:
        x = (x_TI / scale_I).double()
        x_scale_T1 = x.abs().amax(1, keepdim=True) / 127
        w = (w_OI * scale_I).double()
        w_scale_O = w.abs().amax(1) / 127
        whole_TO = (x / x_scale_T1).round() @ (w / w_scale_O[:, None]).round().T
        return float((whole_TO * x_scale_T1 * w_scale_O - exact_TO).square().sum() / exact_TO.square().sum())

    errors = [error(smooth_scale(x_TI.abs().amax(0), [w_OI], alpha)) for alpha in ALPHAS]
    assert found.alpha == ALPHAS[errors.index(min(errors))]
    assert found.error == pytest.approx(min(errors), rel=1e-2)
    assert found.error_before == pytest.approx(error(torch.ones(32)), rel=1e-2)
    assert found.error < 0.5 * found.error_before


def test_the_search_leaves_alone_what_migration_does_not_help() -> None:
    """Inputs and weights without outliers, and only harmful alphas to choose from."""
    found = search_smooth(_random(64, 32).sign(), [_random(24, 32, seed=1)], alphas=(1.0,))
    assert found.error <= found.error_before
    zeros = search_smooth(torch.zeros(4, 32), [_random(24, 32, seed=1)])
    assert zeros.alpha is None and zeros.error == 0 and torch.equal(zeros.scale_I, torch.ones(32))


def test_tokens_are_rounded_as_rows_of_weights_are() -> None:
    """The same int8, a scale each."""
    x_TI = _outliers(16, 32).float()
    values, scale = quantise_8(x_TI, "int8")
    torch.testing.assert_close(round_tokens(x_TI), values.float() * scale[:, None])


def _seen(x: Tensor, n_parts: int = 5) -> Magnitudes:
    seen = Magnitudes()
    for part in x.chunk(n_parts):
        seen.add(part)
    return seen


def _squared_error(x: Tensor, scale: float, to: Format8) -> float:
    if to == "int8":
        rounded = (x / scale).round().clamp(-127, 127)
    else:
        rounded = (x / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double()
    return float((rounded * scale - x).square().mean())


def _heavy(n: int) -> Tensor:
    """Return values with a few far from the rest, the largest last: the range must grow on the way."""
    return (_random(n) * (1 + _random(n, seed=1).abs() ** 3)).abs().sort().values


def test_min_max_cuts_nothing_off() -> None:
    """The largest value becomes 127 or 448, however late it comes."""
    x = _heavy(10_000)
    assert static_scale(_seen(x), Static(method="min-max"), "int8") == pytest.approx(float(x.max()) / 127)
    assert static_scale(_seen(x), Static(method="min-max"), "fp8") == pytest.approx(float(x.max()) / 448)


@pytest.mark.parametrize("kept", [0.9, 0.99, 0.999, 1.0])
def test_a_percentile_keeps_its_share(kept: float) -> None:
    """Of the sorted values themselves, to a bin's width."""
    x = _heavy(20_000)
    limit = static_scale(_seen(x), Static(method="percentile", kept=kept), "int8") * 127
    exact = float(x[math.ceil(kept * len(x)) - 1])
    assert exact - 1e-5 <= limit <= exact + 2.1 * float(x.max()) / 4096


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_least_squares_finds_the_limit_of_brute_force(to: Format8) -> None:
    """Hardly any of 2,000 limits does better on the values themselves."""
    x = _heavy(20_000)
    scale = static_scale(_seen(x), Static(method="mse"), to)
    largest = 127 if to == "int8" else 448
    limits = [float(x.max()) * i / 2000 for i in range(1, 2001)]
    best = min(_squared_error(x, limit / largest, to) for limit in limits)
    assert _squared_error(x, scale, to) <= 1.02 * best
    if to == "int8":
        assert _squared_error(x, scale, to) < _squared_error(x, float(x.max()) / 127, to)


def test_entropy_finds_the_limit_of_its_definition() -> None:
    """Bin by bin and level by level as the method was published, on the same bins."""
    seen = _seen(_heavy(20_000))
    counts, width = seen.bins()
    bins = counts.tolist()
    bins[0] = bins[1]
    best_limit, best = 0.0, math.inf
    for end in range(len(bins), 127, -8):
        p = bins[:end]
        q = [0.0] * end
        levels: dict[int, list[int]] = {}
        for j in range(end):
            if p[j]:
                levels.setdefault(j * 128 // end, []).append(j)
        for filled in levels.values():
            for j in filled:
                q[j] = sum(p[i] for i in filled) / len(filled)
        p[-1] += sum(bins[end:])
        n_p, n_q = sum(p), sum(q)
        terms = [
            a / n_p * math.log((a / n_p) / (b / n_q)) if b else math.inf
            for a, b in zip(p, q, strict=True)
            if a
        ]
        if sum(terms) < best:
            best_limit, best = end * width, sum(terms)
    found = static_scale(seen, Static(method="entropy"), "int8") * 127
    assert found == pytest.approx(min(best_limit, seen.largest))
    assert found < seen.largest


def test_counts_survive_a_range_that_grows() -> None:
    """Bins of the final range, counted from all values at once."""
    x = _heavy(20_000).float()
    counts, width = _seen(x, 50).bins()
    edges = torch.arange(len(counts) + 1) * width
    expected = torch.histogram(x, edges.float()).hist.double()
    assert float(counts.sum()) == 20_000
    assert float((counts.cumsum(0) - expected.cumsum(0)).abs().max()) <= 20  # float32 edges


def test_zeros_alone_have_scale_one_and_nothing_infinite_is_counted() -> None:
    """Whatever the method."""
    seen = _seen(torch.zeros(100))
    for how in (Static(method="min-max"), Static(method="percentile"), Static(), Static(method="entropy")):
        assert static_scale(seen, how, "int8") == 1.0
    with pytest.raises(BuildError, match="not finite"):
        seen.add(torch.tensor([1.0, torch.nan]))
    with pytest.raises(BuildError, match="not finite"):
        smooth_scale(torch.tensor([torch.inf]), [torch.ones(1, 1)], 0.5)
    with pytest.raises(ConfigError, match="migration"):
        smooth_scale(torch.ones(1), [torch.ones(1, 1)], 1.5)
