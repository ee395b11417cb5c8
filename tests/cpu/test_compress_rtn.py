"""Rounding to the nearest, against brute force in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sailfish.base.errors import BuildError
from sailfish.compress import rtn
from sailfish.compress.rtn import OCTAVE, Format8, quantise_8, quantise_int4, restore_8, restore_int4
from sailfish.kernels import int4

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E4M3 = E4M3[E4M3.isfinite()]
"""Every number that float8_e4m3fn has."""


def _weights(n_out: int, n_in: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of several kinds: normal, with an outlier, of one sign, constant, zero, tiny."""
    w = torch.randn(n_out, n_in)
    w[0, n_in // 2] = 40.0
    w[1] = w[1].abs()
    w[2] = -0.25
    w[3] = 0.0
    w[4] *= 1e-30
    return w.to(dtype)


def _grouped(w_OI: Tensor, group: int) -> list[Tensor]:
    return list(torch.split(w_OI.double(), group, dim=1))


def _error(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the least squared error of a group's rows that any choice of codes has with this scale."""
    codes = torch.arange(16, dtype=torch.float64)
    levels = (codes - zero[:, None]) * scale[:, None]
    return (w[:, :, None] - levels[:, None]).square().amin(2).sum(1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("n_in", "group"), [(256, 128), (256, 64), (96, 32), (100, 32), (70, 128), (90, None)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_is_the_nearest_to_its_weight(
    symmetric: bool, n_in: int, group: int | None, dtype: torch.dtype
) -> None:
    w = _weights(37, n_in, dtype)
    code, scale, zero = quantise_int4(w, group, symmetric)
    assert code.shape == w.shape and code.max() <= 15
    assert scale.shape == (37, -(-n_in // (group or n_in))) and scale.dtype == torch.bfloat16
    assert (zero is None) == symmetric
    restored = restore_int4(code, scale, zero, group).double()
    got = [
        (r - g).square().sum(1)
        for r, g in zip(_grouped(restored, group or n_in), _grouped(w, group or n_in), strict=True)
    ]
    zeros = torch.full_like(scale, 8) if zero is None else zero
    for i, part in enumerate(_grouped(w, group or n_in)):
        least = _error(part, scale[:, i].double(), zeros[:, i].double())
        assert torch.allclose(got[i], least, rtol=1e-5, atol=1e-70)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_finds_the_scale_of_least_error_among_its_candidates(symmetric: bool) -> None:
    w = _weights(40, 128)
    _, scale, zero = quantise_int4(w, 128, symmetric)
    found = _error(
        w.double(),
        scale[:, 0].double(),
        torch.full((40,), 8.0).double() if zero is None else zero[:, 0].double(),
    )
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    for share in (8 / 7, *rtn._CLIPS) if symmetric else rtn._CLIPS:
        if symmetric:
            candidate = (torch.where(-low >= high, low, high) / -8 * share).bfloat16()
            its_zero = torch.full((40,), 8.0)
        else:
            candidate = ((high - low) * (share / 15)).bfloat16()
            its_zero = (-low * share / candidate.float()).round().nan_to_num().clamp(0, 15)
        candidate = torch.where(candidate == 0, 1.0, candidate)
        error = _error(w.double(), candidate.double(), its_zero.double())
        assert (found <= error * (1 + 1e-4) + 1e-60).all(), share


def test_without_a_search_nothing_is_cut_off() -> None:
    w = _weights(64, 256)
    for symmetric in (True, False):
        code, scale, zero = quantise_int4(w, 64, symmetric, search=False)
        worst = (restore_int4(code, scale, zero, 64) - w).abs()
        step = scale.float().abs().repeat_interleave(64, 1)
        assert (worst <= step * (0.53 if symmetric else 1.03)).all()


def test_the_search_lowers_the_error_of_normal_weights() -> None:
    w = torch.randn(512, 512)

    def error(*, search: bool, symmetric: bool) -> float:
        code, scale, zero = quantise_int4(w, 128, symmetric, search=search)
        return float((restore_int4(code, scale, zero, 128) - w).norm() / w.norm())

    assert error(search=True, symmetric=True) < 0.85 * error(search=False, symmetric=True)
    assert error(search=True, symmetric=False) < error(search=True, symmetric=True)


@pytest.mark.parametrize("to", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_8_bit_value_is_the_nearest_to_its_weight(to: Format8, dtype: torch.dtype) -> None:
    w = _weights(37, 70, dtype)
    values, scale = quantise_8(w, to)
    levels = E4M3 if to == "fp8" else torch.arange(-127, 128).double()
    assert torch.equal(scale, torch.where(scale == 1, scale, w.float().abs().amax(1) / levels.max()))
    assert scale[3] == 1 and not values[3].float().any()
    scaled = w.double() / scale.double()[:, None]
    nearest = (scaled[..., None] - levels).abs().amin(2)
    assert torch.allclose((values.double() - scaled).abs(), nearest, rtol=0, atol=1e-4)
    assert torch.equal(restore_8(values, scale), values.float() * scale[:, None])


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_each_row_takes_the_multiple_of_its_scale_that_errs_least(to: Format8) -> None:
    w = _weights(17, 64)
    errors = []
    for multiple in OCTAVE:
        scale = (w.abs().amax(1) / (448 if to == "fp8" else 127) * multiple).double()
        levels = E4M3 if to == "fp8" else torch.arange(-127, 128).double()
        scaled = w.double() / scale[:, None].where(scale[:, None] > 0, torch.tensor(1.0))
        errors.append(((scaled[..., None] - levels).abs().amin(2) * scale[:, None]).square().sum(1))
    best = torch.stack(errors).amin(0)
    values, scale = quantise_8(w, to, multiples=OCTAVE)
    error = (restore_8(values, scale) - w).double().square().sum(1)
    torch.testing.assert_close(error, best, rtol=1e-3, atol=1e-12)
    plain = (restore_8(*quantise_8(w, to)) - w).double().square().sum()
    assert error.sum() < (0.95 if to == "fp8" else 1.0) * plain + 1e-12


@pytest.mark.parametrize("chunk", [1, 300, 1 << 20])
def test_results_do_not_depend_on_how_many_rows_are_worked_on_at_once(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = _weights(37, 100)
    whole = (*quantise_int4(w, 32, symmetric=False), *quantise_8(w, "int8"))
    monkeypatch.setitem(rtn._CHUNK_ELEMENTS, "cpu", chunk)
    parts = (*quantise_int4(w, 32, symmetric=False), *quantise_8(w, "int8"))
    for one, other in zip(whole, parts, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    w = torch.randn(8, 64)
    w[5, 60] = bad
    for attempt in (
        lambda: quantise_int4(w, 32),
        lambda: quantise_8(w, "int8"),
        lambda: quantise_8(w, "fp8"),
    ):
        with pytest.raises(BuildError, match="not finite"):
            attempt()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "group"), [((48, 100), 32), ((64, 256), 128), ((80, 70), None)])
def test_the_packed_weight_stands_for_the_same_numbers(
    symmetric: bool, shape: tuple[int, int], group: int | None
) -> None:
    code, scale, zero = quantise_int4(torch.randn(shape), group, symmetric)
    packed = int4.pack(code, scale, zero, torch.bfloat16)
    assert torch.equal(int4.dequantise(packed), restore_int4(code, scale, zero, group))
