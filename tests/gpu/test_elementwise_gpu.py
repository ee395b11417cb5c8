"""The elementwise CUDA kernels agree with the reference at the widths of real models, padding included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sailfish.kernels.contract import ActivationFormat, KvLayer, Quantised
from sailfish.kernels.cuda import elementwise
from sailfish.kernels.reference import elementwise as reference
from sailfish.kernels.reference import quantised

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float32]
FORMATS: list[ActivationFormat] = ["plain", "int8", "fp8"]
WIDTHS = [64, 1000, 1001, 4096, 5120, 8192, 14336, 16384]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def same(found: Tensor | Quantised, expected: Tensor | Quantised) -> None:
    """Equal up to a rounding of the type; 8-bit values up to one step."""
    if isinstance(found, Tensor):
        assert isinstance(expected, Tensor)
        tolerance = 1.6e-2 if found.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found, expected, atol=tolerance / 4, rtol=tolerance)  # sums may cancel
        return
    assert isinstance(expected, Quantised)
    assert found.dtype == expected.dtype and found.values_TI.dtype == expected.values_TI.dtype
    torch.testing.assert_close(found.scale_T, expected.scale_T, atol=0, rtol=8e-3)
    values, others = found.values_TI.float(), expected.values_TI.float()
    step = 1.0 if found.values_TI.dtype == torch.int8 else 2**-3
    assert bool(((values - others).abs() <= step * others.abs().clamp(min=1.0)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out", FORMATS)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms_of_real_widths(width: int, out: ActivationFormat, dtype: torch.dtype, code: str) -> None:
    for n_tokens in (1, 3, 300):
        x, residual, weight = (
            normal(*s, dtype=dtype) for s in ((n_tokens, width), (n_tokens, width), (width,))
        )
        same(
            elementwise.rms_norm(x, weight, 1e-5, False, out), reference.rms_norm(x, weight, 1e-5, False, out)
        )
        found, total = elementwise.add_rms_norm(x, residual, weight, 1e-5, True, out)
        expected, sum_TD = reference.add_rms_norm(x, residual, weight, 1e-5, True, out)
        same(found, expected)
        assert torch.equal(total, sum_TD)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out", ["int8", "fp8"])
@pytest.mark.parametrize("width", [*WIDTHS, 28672, 32768])
def test_quantised_rows_are_those_of_the_reference_bit_for_bit(
    width: int, out: ActivationFormat, dtype: torch.dtype, code: str
) -> None:
    x = normal(70, width, dtype=dtype) * (10.0 ** torch.arange(-35, 35, device="cuda")[:, None]).to(dtype)
    x[7], x[9, width // 2] = 0.0, float("nan")
    found, expected = elementwise.quantise(x, out), quantised.quantise(x, out)
    assert found.scale_T[9].isnan() and found.scale_T[7] == 1.0
    whole = torch.arange(70, device="cuda") != 9
    assert torch.equal(found.scale_T[whole], expected.scale_T[whole])
    assert torch.equal(found.values_TI.view(torch.int8)[whole], expected.values_TI.view(torch.int8)[whole])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out", FORMATS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", WIDTHS)
def test_gated_activations_of_real_widths(
    width: int, activation: str, out: ActivationFormat, dtype: torch.dtype, code: str
) -> None:
    for n_tokens in (1, 5, 300):
        x = normal(n_tokens, 2 * width, dtype=dtype, scale=2.0)
        same(elementwise.act_mul(x, activation, out), reference.act_mul(x, activation, out))


@pytest.mark.parametrize("cache", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("heads", [(32, 8, 128), (6, 6, 64), (8, 1, 256), (14, 2, 80)], ids=str)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 37, 601])
def test_only_slots_that_are_not_negative_are_written(
    n_tokens: int, has_norm: bool, heads: tuple[int, int, int], cache: torch.dtype | None, code: str
) -> None:
    n_heads, n_kv_heads, head_dim = heads
    angle = torch.rand(500, head_dim // 2, device="cuda") * 6
    table = torch.stack((angle.cos(), angle.sin()), 1)
    qkv = normal(n_tokens, (n_heads + 2 * n_kv_heads) * head_dim)
    norms = [normal(head_dim) if has_norm else None for _ in "qk"]
    position = torch.randint(500, (n_tokens,), device="cuda")
    slot = torch.randperm(40 * 16, device="cuda")[:n_tokens]
    is_padding = torch.arange(n_tokens, device="cuda") % 3 == 1
    before = [normal(40, 16, n_kv_heads, head_dim).to(cache or torch.bfloat16) for _ in "kv"]
    scales = [] if cache is None else [torch.rand(40, 16, n_kv_heads, device="cuda") for _ in "kv"]
    mine, theirs, unused = (KvLayer(*(x.clone() for x in (*before, *scales))) for _ in range(3))
    args = (n_heads, *norms, 1e-5, False, table)
    found = elementwise.rope_write(qkv, *args, position, False, mine, torch.where(is_padding, -1, slot))
    same(found, reference.rope_write(qkv, *args, position, False, unused, slot))
    keep = ~is_padding
    reference.rope_write(qkv[keep], *args, position[keep], False, theirs, slot[keep])
    for name in ("k_NPKE", "v_NPKE", "k_scale_NPK", "v_scale_NPK"):
        a, b = getattr(mine, name), getattr(theirs, name)
        if a is None:
            continue
        # what turns may cancel, but for a rounding of the norm
        step = 1.01 if a.dtype == torch.int8 else 0.3 if a.dtype == torch.float8_e4m3fn else 4e-3
        rounding = 0.13 if a.dtype == torch.float8_e4m3fn else 1.6e-2
        torch.testing.assert_close(a.float(), b.float(), atol=step, rtol=rounding)


@pytest.mark.parametrize("width", [16, 37, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embeddings_and_soft_caps_are_exact_or_near(width: int, dtype: torch.dtype) -> None:
    weight = normal(999, width, dtype=dtype)
    token = torch.randint(999, (70,), device="cuda")
    for scale in (1.0, 55.4256):
        assert torch.equal(elementwise.embed(token, weight, scale), reference.embed(token, weight, scale))
    x = normal(3, 1001 * width, dtype=dtype, scale=40.0)
    same(elementwise.softcap(x, 30.0), torch.tanh(x.double() / 30.0).mul(30.0).to(dtype))
