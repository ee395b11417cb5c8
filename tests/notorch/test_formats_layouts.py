"""Packed layers: reading undoes writing to the bit, and the bits lie where the formats' texts say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from formats_fixtures import is_same, random_linear, schemes
from hypothesis import given, settings
from hypothesis import strategies as st

from sailfish.base.errors import CheckpointError, ConfigError, UserError
from sailfish.checkpoint.formats.codec import read_linear, rejects, write_linear
from sailfish.checkpoint.formats.linear import QuantisedLinear
from sailfish.checkpoint.formats.scheme import ActivationScheme, LinearScheme
from sailfish.checkpoint.formats.tensors import StoredTensor
from sailfish.checkpoint.formats.words import n_words, pack, unpack

LAYOUTS = ("gptq", "gptq_v2", "awq", "pack-quantized", "int-quantized", "float-quantized")
GPTQ = LinearScheme(layout="gptq", bits=4, strategy="group", group=64)
AWQ = LinearScheme(layout="awq", bits=4, strategy="group", group=64, symmetric=False)
PACKED = LinearScheme(layout="pack-quantized", bits=4, strategy="group", group=64)


def brute_pack(codes: np.ndarray, bits: int) -> list[int]:
    """Return the words of one row, built as one large number."""
    total = sum(int(code) << (bits * place) for place, code in enumerate(codes))
    return [total >> (32 * word) & 0xFFFFFFFF for word in range(-(-len(codes) * bits // 32))]


@given(bits=st.integers(1, 8), n_codes=st.integers(1, 100), rows=st.integers(1, 3), seed=st.integers(0, 99))
def test_words_hold_codes_in_a_row_from_the_lowest_bit_on(
    bits: int, n_codes: int, rows: int, seed: int
) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, n_codes), np.uint8)
    words = pack(codes, bits)
    assert words.shape == (rows, n_words(n_codes, bits))
    assert [row.view("<u4").tolist() for row in words] == [brute_pack(row, bits) for row in codes]
    assert np.array_equal(unpack(words, bits, n_codes), codes)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_loose_words_hold_no_code_across_two_of_them(bits: int) -> None:
    per_word = 32 // bits
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (2, 40), np.uint8)
    words = np.zeros((2, n_words(40, bits, dense=False)), np.uint32)
    for place in range(40):
        words[:, place // per_word] |= codes[:, place].astype(np.uint32) << np.uint32(place % per_word * bits)
    assert np.array_equal(unpack(words.view(np.int32), bits, 40, dense=False), codes)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    scheme=schemes(LAYOUTS),
    n_out=st.sampled_from([32, 64, 96]),
    n_in=st.sampled_from([64, 128, 192]),
    seed=st.integers(0, 1000),
)
def test_a_layer_written_and_read_is_the_same_in_every_bit(
    scheme: LinearScheme, n_out: int, n_in: int, seed: int
) -> None:
    linear = random_linear(scheme, n_out, n_in, seed)
    tensors = write_linear(linear, scheme, "a layer")
    assert is_same(read_linear(tensors, scheme, "a layer", (n_out, n_in)), linear)
    again = write_linear(read_linear(tensors, scheme, "a layer"), scheme, "a layer")
    assert dict(again) == dict(tensors)


@given(n_out=st.integers(1, 20), n_in=st.integers(1, 100), bits=st.integers(1, 8), seed=st.integers(0, 99))
@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized", "float-quantized"])
def test_compressed_tensors_hold_layers_of_any_size(
    layout: str, n_out: int, n_in: int, bits: int, seed: int
) -> None:
    bits = bits if layout == "pack-quantized" else 8
    scheme = LinearScheme(layout=layout, bits=bits, strategy="channel", symmetric=layout == "float-quantized")
    linear = random_linear(scheme, n_out, n_in, seed)
    assert is_same(read_linear(write_linear(linear, scheme, "a layer"), scheme, "a layer"), linear)


def test_gptq_packs_along_the_inputs_and_takes_one_from_each_zero_point() -> None:
    linear = random_linear(replace(GPTQ, symmetric=False), 8, 128, 1)
    assert linear.zero_OG is not None
    linear.zero_OG[:] = np.clip(linear.zero_OG, 1, None)
    older = write_linear(linear, replace(GPTQ, symmetric=False), "a layer")
    newer = write_linear(linear, replace(GPTQ, symmetric=False, layout="gptq_v2"), "a layer")
    for tensors, lacks in ((older, 1), (newer, 0)):
        for i, o in ((0, 0), (9, 3), (127, 7)):
            assert int(tensors["qweight"].array[i // 8, o]) >> (4 * (i % 8)) & 15 == linear.code_OI[o, i]
        for g, o in ((0, 0), (1, 5)):
            nibble = int(tensors["qzeros"].array[g, 0]) >> (4 * o) & 15
            assert nibble == linear.zero_OG[o, g] - lacks
        assert np.array_equal(tensors["scales"].array.T, linear.scale_OG.astype(np.float16))
        assert tensors["g_idx"].array.tolist() == [0] * 64 + [1] * 64
    symmetric = write_linear(random_linear(GPTQ, 8, 128, 1), GPTQ, "a layer")
    assert set(symmetric["qzeros"].array.view(np.uint32).ravel().tolist()) == {0x77777777}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_point_of_0_survives_the_layout_that_takes_one_away(bits: int) -> None:
    scheme = replace(GPTQ, bits=bits, symmetric=False)
    linear = random_linear(scheme, 32, 64, bits)
    assert linear.zero_OG is not None
    linear.zero_OG[::2] = 0
    read = read_linear(write_linear(linear, scheme, "a layer"), scheme, "a layer")
    assert read.zero_OG is not None and np.array_equal(read.zero_OG, linear.zero_OG)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_symmetric_layer_under_the_wrong_layouts_name_is_still_symmetric(bits: int) -> None:
    scheme = replace(GPTQ, bits=bits)
    linear = random_linear(scheme, 32, 64, bits)
    tensors = write_linear(linear, replace(scheme, layout="gptq_v2"), "a layer")
    assert is_same(read_linear(tensors, scheme, "a layer"), linear)
    as_said = read_linear(tensors, replace(scheme, symmetric=False), "a layer")
    assert as_said.zero_OG is not None and set(as_said.zero_OG.ravel().tolist()) == {(1 << (bits - 1)) + 1}


def test_awq_packs_along_the_outputs_in_its_own_order() -> None:
    linear = random_linear(AWQ, 16, 64, 2)
    tensors = write_linear(linear, AWQ, "a layer")
    assert linear.zero_OG is not None
    for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        for word in range(2):
            o = 8 * word + output
            assert int(tensors["qweight"].array[37, word]) >> (4 * place) & 15 == linear.code_OI[o, 37]
            assert int(tensors["qzeros"].array[0, word]) >> (4 * place) & 15 == linear.zero_OG[o, 0]
    assert tensors["scales"].array.shape == (1, 16)


def brute_weight(linear: QuantisedLinear) -> np.ndarray:
    """Return the weight by the definition, in float64, one element at a time."""
    n_out, n_in = linear.shape
    weight = np.empty((n_out, n_in))
    for o in range(n_out):
        for i in range(n_in):
            g = i // linear.group if linear.g_idx is None else int(linear.g_idx[i])
            zero = 1 << (linear.bits - 1) if linear.zero_OG is None else int(linear.zero_OG[o, g])
            weight[o, i] = (int(linear.code_OI[o, i]) - zero) * float(linear.scale_OG[o, g])
    return weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_the_weight_is_code_less_zero_times_scale(symmetric: bool, act_order: bool) -> None:
    scheme = replace(GPTQ, symmetric=symmetric, act_order=act_order)
    linear = random_linear(scheme, 16, 128, 3)
    assert np.array_equal(linear.dequantise(), brute_weight(linear).astype(np.float32))
    if act_order:
        assert linear.order is not None and linear.g_idx is not None
        assert linear.g_idx[linear.order].tolist() == sorted(linear.g_idx)
    else:
        assert linear.order is None


def test_float8_codes_mean_what_the_paper_says() -> None:
    scheme = LinearScheme(layout="float-quantized", bits=8, strategy="tensor")
    linear = random_linear(scheme, 1, 8, 0)
    linear.code_OI[0] = [0x00, 0x80, 0x38, 0xB8, 0x7E, 0x01, 0x08, 0x07]
    linear.scale_OG[:] = 1
    expected = [0.0, -0.0, 1.0, -1.0, 448.0, 2.0**-9, 2.0**-6, 7 * 2.0**-9]
    assert linear.dequantise()[0].tolist() == expected


@settings(max_examples=60, deadline=None)
@given(source=schemes(LAYOUTS), target=schemes(LAYOUTS), seed=st.integers(0, 99))
def test_one_format_becomes_another_exactly_or_is_refused_in_words(
    source: LinearScheme, target: LinearScheme, seed: int
) -> None:
    linear = random_linear(source, 32, 128, seed)
    reason = rejects(linear, target)
    if reason is not None:
        with pytest.raises(ConfigError) as caught:
            write_linear(linear, target, "a layer")
        assert reason in str(caught.value) and "\n" not in str(caught.value)
        return
    through = read_linear(write_linear(linear, target, "a layer"), target, "a layer")
    assert np.array_equal(through.dequantise(), linear.dequantise())
    assert np.array_equal(through.code_OI, linear.code_OI)


def test_four_bits_pass_through_all_three_formats_unchanged() -> None:
    first = random_linear(replace(GPTQ, symmetric=False), 64, 192, 5)
    linear = first
    for scheme in (AWQ, replace(PACKED, symmetric=False), replace(GPTQ, layout="gptq_v2", symmetric=False)):
        linear = read_linear(write_linear(linear, scheme, "a layer"), scheme, "a layer")
    assert is_same(linear, first)


def test_scales_that_a_type_does_not_hold_are_refused() -> None:
    third = np.array([1 / 3], np.float32)
    for dtype in ("BF16", "F16"):
        with pytest.raises(ConfigError, match=f"not exact in {dtype}"):
            StoredTensor.from_floats(third, dtype)
    with pytest.raises(ConfigError, match="not exact in F16"):
        StoredTensor.from_floats(np.array([1e6], np.float32), "F16")
    assert np.array_equal(StoredTensor.from_floats(third, "F32").floats(), third)
    exact = np.array([1.5, -0.0078125, 0.0], np.float32)
    assert np.array_equal(StoredTensor.from_floats(exact, "BF16").floats(), exact)


def _i32(*shape: int) -> StoredTensor:
    return StoredTensor(dtype="I32", array=np.zeros(shape, np.int32))


def _f16(*shape: int, value: float = 1.0) -> StoredTensor:
    return StoredTensor(dtype="F16", array=np.full(shape, value, np.float16))


def _shape(*sizes: int) -> StoredTensor:
    return StoredTensor(dtype="I64", array=np.array(sizes, np.int64))


GPTQ_PARTS = {"qweight": _i32(16, 8), "qzeros": _i32(2, 1), "scales": _f16(2, 8), "g_idx": _i32(128)}
AWQ_PARTS = {"qweight": _i32(128, 1), "qzeros": _i32(2, 1), "scales": _f16(2, 8)}
PACKED_PARTS = {"weight_packed": _i32(8, 16), "weight_scale": _f16(8, 2), "weight_shape": _shape(8, 128)}
STATIC = ActivationScheme(kind="int", dynamic=False, strategy="tensor")


@pytest.mark.parametrize(
    ("scheme", "parts", "change"),
    [
        (GPTQ, GPTQ_PARTS, {"qweight": None}),
        (GPTQ, GPTQ_PARTS, {"qweight": _i32(16)}),
        (GPTQ, GPTQ_PARTS, {"qweight": _i32(0, 8)}),
        (GPTQ, GPTQ_PARTS, {"qweight": _i32(16, 9)}),
        (GPTQ, GPTQ_PARTS, {"qweight": _f16(16, 8)}),
        (GPTQ, GPTQ_PARTS, {"scales": _f16(3, 8)}),
        (GPTQ, GPTQ_PARTS, {"scales": _i32(2, 8)}),
        (GPTQ, GPTQ_PARTS, {"scales": _f16(2, 8, value=np.nan)}),
        (GPTQ, GPTQ_PARTS, {"scales": _f16(2, 8, value=np.inf)}),
        (GPTQ, GPTQ_PARTS, {"qzeros": _i32(2, 2)}),
        (GPTQ, GPTQ_PARTS, {"g_idx": _i32(127)}),
        (GPTQ, GPTQ_PARTS, {"extra": _i32(1)}),
        (replace(GPTQ, act_order=True), GPTQ_PARTS, {}),
        (replace(GPTQ, act_order=True), GPTQ_PARTS, {"g_idx": None}),
        (replace(GPTQ, bits=3), GPTQ_PARTS, {}),
        (AWQ, AWQ_PARTS, {"scales": _f16(2, 16)}),
        (AWQ, AWQ_PARTS, {"qzeros": None}),
        (replace(AWQ, group=96), AWQ_PARTS, {}),
        (AWQ, AWQ_PARTS, {"g_idx": _i32(128)}),
        (PACKED, PACKED_PARTS, {"weight_shape": _shape(8)}),
        (PACKED, PACKED_PARTS, {"weight_shape": _shape(8, 2**60)}),
        (PACKED, PACKED_PARTS, {"weight_shape": _shape(8, -128)}),
        (PACKED, PACKED_PARTS, {"weight_shape": _shape(9, 128)}),
        (PACKED, PACKED_PARTS, {"weight_shape": None}),
        (PACKED, PACKED_PARTS, {"weight_scale": _f16(8, 1)}),
        (PACKED, PACKED_PARTS, {"weight_scale": _f16(8)}),
        (PACKED, PACKED_PARTS, {"weight_zero_point": _i32(1, 2)}),
        (replace(PACKED, symmetric=False), PACKED_PARTS, {}),
        (replace(PACKED, symmetric=False), PACKED_PARTS, {"weight_zero_point": _i32(2, 2)}),
        (replace(PACKED, act_order=True), PACKED_PARTS, {"weight_g_idx": _i32(128)}),
        (replace(PACKED, activations=STATIC), PACKED_PARTS, {}),
        (replace(PACKED, activations=STATIC), PACKED_PARTS, {"input_scale": _f16(1, value=-1)}),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_in_one_line(
    scheme: LinearScheme, parts: dict[str, StoredTensor], change: dict[str, StoredTensor | None]
) -> None:
    tensors = {name: tensor for name, tensor in (parts | change).items() if tensor is not None}
    with pytest.raises(UserError) as caught:
        read_linear(tensors, scheme, "model.layers.0.mlp.up_proj")
    assert isinstance(caught.value, CheckpointError)
    assert "model.layers.0.mlp.up_proj" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    scheme=schemes(LAYOUTS),
    seed=st.integers(0, 9),
    name=st.integers(0, 9),
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 64]), max_size=3),
    dtype=st.sampled_from([("I32", "<i4"), ("I64", "<i8"), ("I8", "i1"), ("F16", "<f2"), ("F8_E4M3", "u1")]),
    fill=st.integers(-128, 127),
)
def test_whatever_a_tensor_holds_it_is_read_or_refused_in_one_line(
    scheme: LinearScheme, seed: int, name: int, shape: list[int], dtype: tuple[str, str], fill: int
) -> None:
    tensors = dict(write_linear(random_linear(scheme, 32, 128, seed), scheme, "a layer"))
    bad = np.full(shape, fill).astype(np.int64).astype(dtype[1], casting="unsafe")
    tensors[sorted(tensors)[name % len(tensors)]] = StoredTensor(dtype=dtype[0], array=bad)
    try:
        linear = read_linear(tensors, scheme, "a layer")
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert linear.dequantise().shape == linear.shape


def test_a_layer_of_another_size_than_the_models_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"8 outputs and 128 inputs, the model has \(8, 256\)"):
        read_linear(PACKED_PARTS, PACKED, "up_proj", (8, 256))


def test_a_float8_that_is_not_a_number_is_refused() -> None:
    scheme = LinearScheme(layout="float-quantized", bits=8, strategy="channel")
    tensors = {
        "weight": StoredTensor(dtype="F8_E4M3", array=np.full((2, 4), 0xFF, np.uint8)),
        "weight_scale": _f16(2, 1),
    }
    with pytest.raises(CheckpointError, match="not a number"):
        read_linear(tensors, scheme, "up_proj")
