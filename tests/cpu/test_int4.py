"""The INT4 layout: packing is undone exactly, and every lane finds its fragment where the layout says."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sailfish.base.errors import BuildError
from sailfish.kernels.int4 import MIDDLE, Int4Weight, dequantise, linear_int4, pack, unpack

GROUPS = (32, 64, 128, None)


def draw(
    n_out: int, n_in: int, group: int | None, zeros: bool, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return random codes, scales and zeros (or None)."""
    generator = torch.Generator().manual_seed(seed)
    n_groups = 1 if group is None else -(-n_in // group)
    code = torch.randint(0, 16, (n_out, n_in), dtype=torch.uint8, generator=generator)
    scale = torch.rand(n_out, n_groups, generator=generator) + 0.01
    zero = torch.randint(0, 16, (n_out, n_groups), generator=generator).float() if zeros else None
    return code, scale, zero


@given(
    n_out=st.integers(1, 150),
    n_in=st.integers(1, 400),
    group=st.sampled_from(GROUPS),
    zeros=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_unpacking_undoes_packing(
    n_out: int, n_in: int, group: int | None, zeros: bool, dtype: torch.dtype, seed: int
) -> None:
    code, scale, zero = draw(n_out, n_in, group, zeros, seed)
    weight = pack(code, scale, zero, dtype)
    code_again, scale_again, zero_again = unpack(weight)
    assert torch.equal(code_again, code)
    assert torch.equal(scale_again, scale.to(dtype))
    assert (zero_again is None) == (zero is None)
    assert zero is None or (zero_again is not None and torch.equal(zero_again.float(), zero))
    assert weight.packed.shape[0] % 4 == 0
    assert weight.packed.shape[1] * 64 % weight.group == 0


@given(
    n_out=st.integers(1, 70),
    n_in=st.integers(1, 300),
    group=st.sampled_from(GROUPS),
    zeros=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_padding_is_weights_that_are_zero(
    n_out: int, n_in: int, group: int | None, zeros: bool, seed: int
) -> None:
    packed = pack(*draw(n_out, n_in, group, zeros, seed), torch.bfloat16)
    strips, units = packed.packed.shape[:2]
    whole = Int4Weight(
        packed=packed.packed,
        scale=packed.scale,
        zero=packed.zero,
        n_out=strips * 16,
        n_in=units * 64,
        group=packed.group,
    )
    w = dequantise(whole)
    assert torch.equal(w[:n_out, :n_in], dequantise(packed))
    assert not w[n_out:].any()
    assert not w[:, n_in:].any()


def test_each_lane_owns_the_fragment_that_the_tensor_cores_ask_it_for() -> None:
    """The fragment of m16n8k16's A operand, written out from the PTX manual's formulas."""
    n_out, n_in = 64, 192
    code, scale, _ = draw(n_out, n_in, 64, zeros=False)
    packed = pack(code, scale, None, torch.bfloat16).packed
    for strip in range(n_out // 16):
        for unit in range(n_in // 64):
            for lane in range(32):
                for tile in range(4):
                    word = int(packed[strip, unit, lane, tile].item())
                    for i in range(8):  # a0 .. a7, two to a register
                        row = lane // 4 + (8 if i in (2, 3, 6, 7) else 0)
                        column = lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)
                        nibble = i // 2 + 4 * (i & 1)
                        want = code[strip * 16 + row, unit * 64 + tile * 16 + column].item()
                        assert word >> 4 * nibble & 15 == want


def test_bits_of_a_code_are_exact_floats() -> None:
    """Or-ed into 128, or bare: then a byte's high nibble is 16 times its low one, in both formats."""
    for q in range(16):
        (as_float32,) = struct.unpack("<f", struct.pack("<I", (0x4300 | q) << 16))
        assert as_float32 == 128 + q
        for shift, factor in ((0, 1), (4, 16)):
            (as_bfloat16,) = struct.unpack("<f", struct.pack("<I", q << shift << 16))
            assert as_bfloat16 == factor * q * 2.0**-133
            (as_float16,) = struct.unpack("<e", struct.pack("<H", q << shift))
            assert as_float16 == factor * q * 2.0**-24


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("zeros", [False, True])
def test_a_product_is_that_of_the_weights_written_out(group: int | None, zeros: bool) -> None:
    n_out, n_in = 50, 260
    code, scale, zero = draw(n_out, n_in, group, zeros)
    weight = pack(code, scale, zero, torch.bfloat16)
    width = n_in if group is None else group
    w = torch.zeros(n_out, n_in, dtype=torch.float64)
    for i in range(n_in):
        middle = MIDDLE if zero is None else zero[:, i // width]
        w[:, i] = (code[:, i].double() - middle) * scale[:, i // width].bfloat16().double()
    assert torch.equal(dequantise(weight).double(), w)
    x = torch.randn(5, n_in, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(n_out, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(
        linear_int4(x, weight, bias).double(), x.double() @ w.T + bias, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize(
    ("code", "n_groups", "dtype", "words"),
    [
        (torch.zeros(16, 256, dtype=torch.uint8), 3, torch.bfloat16, "3 groups"),
        (torch.zeros(16, 256, dtype=torch.int32), 2, torch.bfloat16, "uint8"),
        (torch.zeros(16, 256, dtype=torch.uint8), 2, torch.float64, "float64"),
    ],
    ids=["groups", "codes", "scales"],
)
def test_what_cannot_be_packed_is_refused_in_words(
    code: torch.Tensor, n_groups: int, dtype: torch.dtype, words: str
) -> None:
    with pytest.raises(BuildError, match=words):
        pack(code, torch.ones(16, n_groups), None, dtype)


def test_scales_of_another_shape_are_refused() -> None:
    with pytest.raises(BuildError, match="scales"):
        pack(torch.zeros(16, 256, dtype=torch.uint8), torch.ones(8, 2), None, torch.bfloat16)
