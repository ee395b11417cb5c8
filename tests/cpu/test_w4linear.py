"""W4Linear in a user's own torch module: its numbers and states, foreign checkpoints, what it refuses."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, library
from torch.nn import Linear

import sailfish
from sailfish import W4Linear, replace_linears
from sailfish.base.errors import BuildError, CheckpointError, ConfigError, EngineError, UserError
from sailfish.compress.rtn import quantise_int4, restore_int4
from sailfish.data import demo_model
from sailfish.kernels import torch_op
from sailfish.kernels.choose import bind_linear, choose_by_rows
from sailfish.kernels.contract import Case

INTERCHANGE = Path(__file__).parents[2].parent / "shared" / "models" / "interchange"
SHAPES = [(64, 64), (256, 768), (96, 50), (200, 17), (130, 1), (7, 5), (1000, 24)]
"""Inputs and outputs, at and off the edges of units, groups and strips."""


def linear(n_in: int, n_out: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> Linear:
    torch.manual_seed(n_in * 1000 + n_out)
    return Linear(n_in, n_out, bias=bias).to(dtype)


def written_out(layer: W4Linear) -> Linear:
    """Return the torch layer of the same numbers."""
    plain = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    with torch.no_grad():
        plain.weight.copy_(layer.dequantise())
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
    return plain


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
def test_a_linear_becomes_the_product_with_its_rounded_weight(
    n_in: int, n_out: int, group: int | None, symmetric: bool
) -> None:
    plain = linear(n_in, n_out, bias=n_out % 2 == 0)
    layer = W4Linear.from_linear(plain, group, symmetric)
    rounded = restore_int4(*quantise_int4(plain.weight.detach(), group, symmetric), group)
    assert torch.equal(layer.dequantise(), rounded)
    assert (rounded - plain.weight).norm() < 0.2 * plain.weight.norm()
    for leading in ((), (1,), (3,), (2, 5), (2, 3, 4), (0,), (2, 0)):
        x = torch.randn(*leading, n_in)
        assert torch.allclose(layer(x), torch.nn.functional.linear(x, rounded, plain.bias), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_layer_answers_in_the_dtype_of_what_it_is_given(dtype: torch.dtype) -> None:
    layer = W4Linear.from_linear(linear(192, 40))
    x = torch.randn(5, 192).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    truth = written_out(layer).double()(x.double()).detach()
    error = {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(dtype, 1e-5)
    assert float((y.double() - truth).norm() / truth.norm()) < error


@pytest.mark.parametrize(
    ("of_weight", "asked", "expected"),
    [
        (torch.float32, None, torch.bfloat16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.float16),
        (torch.float32, torch.float16, torch.float16),
    ],
)
def test_scales_take_the_dtype_of_a_16_bit_weight(
    of_weight: torch.dtype, asked: torch.dtype | None, expected: torch.dtype
) -> None:
    layer = W4Linear.from_linear(linear(128, 16, dtype=of_weight), symmetric=False, dtype=asked)
    assert layer.scale.dtype == expected
    assert layer.zero is not None and layer.zero.dtype == expected
    assert layer.bias is not None and layer.bias.dtype == of_weight


def test_a_layer_keeps_nothing_of_the_one_it_was_made_from() -> None:
    plain = linear(128, 16)
    layer = W4Linear.from_linear(plain)
    x = torch.randn(3, 128)
    before = layer(x)
    with torch.no_grad():
        plain.weight.zero_()
        plain.bias.fill_(7)
    assert torch.equal(layer(x), before)
    assert not list(layer.parameters())


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n_in", "n_out", "group"), [(256, 48, 128), (200, 17, 64), (256, 24, None)])
def test_a_state_loads_into_an_empty_layer(
    n_in: int, n_out: int, group: int | None, symmetric: bool, ordered: bool, tmp_path: Path
) -> None:
    layer = W4Linear.from_linear(linear(n_in, n_out), group, symmetric)
    if ordered:
        layer.register_buffer("order", torch.randperm(n_in))
    file = tmp_path / "state"
    torch.save(layer.state_dict(), file)
    empty = W4Linear(n_in, n_out, group=group, symmetric=symmetric, ordered=ordered, dtype=torch.bfloat16)
    assert not empty(torch.randn(2, n_in)).any()
    empty.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(4, n_in)
    # The bias was float32 and is loaded in the dtype of the scales.
    assert torch.allclose(empty(x), layer(x), atol=1e-2)
    assert torch.equal(empty.dequantise(), layer.dequantise())
    assert repr(empty) == repr(layer)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_a_layer_says_what_it_is() -> None:
    layer = W4Linear.from_linear(linear(256, 16, bias=False), 64, False)
    assert repr(layer) == (
        "W4Linear(in_features=256, out_features=16, bias=False, group=64, symmetric=False)"
    )
    assert "group=None, symmetric=True, ordered=True" in repr(W4Linear(256, 16, group=None, ordered=True))


def test_a_layer_moves_with_its_model() -> None:
    model = torch.nn.Sequential(linear(128, 64), torch.nn.ReLU(), linear(64, 8))
    assert replace_linears(model) == 2
    x = torch.randn(3, 128)
    before = model(x)
    half = model.half()
    assert half[0].scale.dtype == torch.float16 and half[0].packed.dtype == torch.int32
    assert torch.allclose(half(x), before, atol=1e-2)
    assert half.to("meta")(x.to("meta")).shape == (3, 8)


def test_gradients_pass_through_to_the_activations_as_through_the_written_out_layer() -> None:
    layer = W4Linear.from_linear(linear(192, 40))
    found, expected = (torch.randn(2, 3, 192, generator=torch.manual_seed(1)) for _ in range(2))
    for x, module in ((found.requires_grad_(), layer), (expected.requires_grad_(), written_out(layer))):
        module(x).square().sum().backward()
    assert found.grad is not None and expected.grad is not None
    assert torch.allclose(found.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_the_compiler_traces_a_model_of_such_layers_whole() -> None:
    model = torch.nn.Sequential(linear(128, 64), torch.nn.ReLU(), linear(64, 8)).eval()
    replace_linears(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for n in (2, 5):
            x = torch.randn(n, 128)
            assert torch.equal(compiled(x), model(x))
    layer = model[0]
    arguments = (layer.packed, layer.scale, layer.zero, layer.bias, 64, 128, 128)
    x = torch.randn(3, 128, requires_grad=True)
    library.opcheck(torch.ops.sailfish.linear_int4.default, (x, *arguments))


def test_a_layer_is_multiplied_as_an_engine_of_that_shape_would(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Case] = []

    def spied(case: Case) -> Any:
        asked.append(case)
        return bind_linear(case)

    monkeypatch.setattr(torch_op, "bind_linear", spied)
    torch_op._bound.cache_clear()
    layer = W4Linear.from_linear(linear(200, 17), 64)
    for n in (1, 9, 300):
        layer(torch.randn(n, 200))
    assert asked == [Case(op="linear_int4", target="cpu", dtype="float32", n_out=17, n_in=200, group=64)]
    torch_op._bound.cache_clear()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90"])
def test_the_kernels_of_both_16_bit_dtypes_are_chosen_by_rows(target: str, dtype: str) -> None:
    case = Case(op="linear_int4", target=target, dtype=dtype, n_out=4096, n_in=4096, group=128)
    found = [(choice.implementation, choice.max_rows) for choice in choose_by_rows(case)]
    assert found == [("cuda_stream_int4", 16), ("cuda_wide_int4", None)]
    odd = Case(op="linear_int4", target=target, dtype=dtype, n_out=4096, n_in=4100, group=128)
    [choice] = choose_by_rows(odd)
    assert choice.implementation == "cuda_wide_int4"
    assert ("cuda_stream_int4", "reads 8 inputs at a time, the weight has 4100") in choice.declined


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: W4Linear.from_linear(linear(128, 8), 100), ConfigError, "group of 100 .* 32, 64, 128, or"),
        (lambda: W4Linear(128, 8, group=256), ConfigError, "group of 256"),
        (lambda: W4Linear(128, 8, dtype=torch.float32), ConfigError, "scales in torch.float32"),
        (lambda: replace_linears(Linear(8, 8), group=7), ConfigError, "group of 7"),
        (
            lambda: W4Linear.from_linear(Linear(8, 8, device="meta")),
            ConfigError,
            "a weight on meta cannot be quantised .load it",
        ),
        (lambda: W4Linear.from_linear(with_nan(linear(128, 8))), BuildError, "not finite"),
        (lambda: W4Linear(128, 8)(torch.zeros(3, 64)), UserError, r"activations \(3, 64\) do not fit .* 128"),
        (lambda: W4Linear(128, 8)(torch.zeros(())), UserError, "do not fit"),
    ],
)
def test_what_it_cannot_do_is_refused_in_words(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def with_nan(plain: Linear) -> Linear:
    with torch.no_grad():
        plain.weight[3, 5] = float("nan")
    return plain


class Gptq:
    """One layer as the GPTQ papers' code stores it, made in numpy, one number after the other."""

    def __init__(self, n_in: int, n_out: int, group: int, *, has_zeros: bool, is_ordered: bool) -> None:
        draw = np.random.default_rng(n_in + n_out + group)
        n_groups = -(-n_in // group)
        code_IO = draw.integers(0, 16, (n_in, n_out))
        zero_GO = draw.integers(0, 16, (n_groups, n_out)) if has_zeros else np.full((n_groups, n_out), 8)
        self.scale_GO = draw.uniform(0.001, 0.02, (n_groups, n_out)).astype(np.float16)
        self.group_I = np.arange(n_in) // group
        if is_ordered:
            self.group_I = draw.permutation(self.group_I)
        self.weight_OI = np.empty((n_out, n_in))
        qweight = np.zeros((n_in // 8, n_out), dtype=np.uint32)
        self.qzeros_v2 = np.zeros((n_groups, n_out // 8), dtype=np.uint32)
        for i in range(n_in):
            g = self.group_I[i]
            self.weight_OI[:, i] = (code_IO[i] - zero_GO[g]) * self.scale_GO[g].astype(np.float64)
            for o in range(n_out):
                qweight[i // 8, o] |= np.uint32(int(code_IO[i, o]) << 4 * (i % 8))
        for g in range(n_groups):
            for o in range(n_out):
                self.qzeros_v2[g, o // 8] |= np.uint32(int(zero_GO[g, o]) << 4 * (o % 8))
        # GPTQModel takes the ones from whole words: a zero point of 0 borrows from the next.
        qzeros = self.qzeros_v2 - np.uint32(0x11111111)
        self.qweight, self.qzeros = qweight.view(np.int32), qzeros.view(np.int32)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors that every such layer has."""
        return torch.tensor(self.qweight), torch.tensor(self.qzeros), torch.tensor(self.scale_GO)

    @property
    def g_idx(self) -> Tensor:
        """The group of each input."""
        return torch.tensor(self.group_I, dtype=torch.int32)


@pytest.mark.parametrize("is_ordered", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("has_zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize(
    ("n_in", "n_out", "group"),
    [(256, 48, 128), (192, 24, 128), (200, 16, 64), (96, 8, 32), (512, 16, 256), (1152, 8, 512), (96, 8, 96)],
)
def test_a_gptq_layer_keeps_its_numbers(
    n_in: int, n_out: int, group: int, has_zeros: bool, is_ordered: bool
) -> None:
    stored = Gptq(n_in, n_out, group, has_zeros=has_zeros, is_ordered=is_ordered)
    bias = torch.randn(n_out)
    layer = W4Linear.from_gptq(*stored.tensors, stored.g_idx, bias=bias)
    assert layer.scale.dtype == torch.float16
    truth = torch.tensor(stored.weight_OI)
    assert torch.equal(layer.dequantise().double(), truth)
    x = torch.randn(3, 2, n_in)
    assert torch.allclose(layer(x).double(), x.double() @ truth.T + bias, atol=1e-5)
    assert (layer.order is not None) == (is_ordered and group < n_in)
    assert (layer.zero is not None) == has_zeros
    if not is_ordered:
        again = W4Linear.from_gptq(*stored.tensors)
        assert torch.equal(again.dequantise(), layer.dequantise())


def test_zeros_of_the_second_format_are_taken_as_they_are() -> None:
    stored = Gptq(128, 16, 64, has_zeros=True, is_ordered=False)
    qweight, _, scales = stored.tensors
    layer = W4Linear.from_gptq(
        qweight, torch.tensor(stored.qzeros_v2.view(np.int32)), scales, checkpoint_format="gptq_v2"
    )
    assert torch.equal(layer.dequantise().double(), torch.tensor(stored.weight_OI))


def test_gptq_scales_may_be_rounded_to_bfloat16() -> None:
    stored = Gptq(128, 16, 64, has_zeros=True, is_ordered=True)
    layer = W4Linear.from_gptq(*stored.tensors, stored.g_idx, dtype=torch.bfloat16)
    assert layer.scale.dtype == torch.bfloat16
    truth = torch.tensor(stored.weight_OI)
    assert 0 < float((layer.dequantise() - truth).norm() / truth.norm()) < 2**-8


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda w, z, s, g: ((w, z, s, g), {"bits": 8}), ConfigError, "8 bits are not supported"),
        (
            lambda w, z, s, g: ((w, z, s, g), {"checkpoint_format": "awq"}),
            ConfigError,
            "'awq' is unknown .use gptq or gptq_v2",
        ),
        (lambda w, z, s, g: ((w.long(), z, s, g), {}), CheckpointError, "not torch.int64"),
        (lambda w, z, s, g: ((w, z, s.int(), g), {}), CheckpointError, "torch.int32$"),
        (lambda w, z, s, g: ((w, z[:1], s, g), {}), CheckpointError, "do not fit each other"),
        (lambda w, z, s, g: ((w[:, :8], z, s, g), {}), CheckpointError, "do not fit each other"),
        (lambda w, z, s, g: ((w[None], z, s, g), {}), CheckpointError, "two axes"),
        (lambda w, z, s, g: ((w[:0], z, s, g), {}), CheckpointError, "two axes"),
        (lambda w, z, s, g: ((w, z, s, g[:8]), {}), CheckpointError, "each of 128 inputs"),
        (lambda w, z, s, g: ((w, z, s, g * 0), {}), ConfigError, "2 GPTQ groups of 128 inputs"),
        (lambda w, z, s, g: ((w, z, s, g.clamp(max=0)), {}), ConfigError, "2 GPTQ groups"),
        (lambda w, z, s, g: ((w, z, s, g * 3), {}), CheckpointError, "64 inputs to each group"),
        (
            lambda w, z, s, g: ((w, z.repeat(8, 1), s.repeat(8, 1), None), {}),
            ConfigError,
            "16 GPTQ groups of 128 inputs are not supported .groups of 32 inputs",
        ),
    ],
)
def test_gptq_tensors_that_are_damaged_or_of_another_kind_are_refused_in_words(
    change: Any, error: type[Exception], words: str
) -> None:
    stored = Gptq(128, 16, 64, has_zeros=False, is_ordered=False)
    arguments, options = change(*stored.tensors, stored.g_idx)
    with pytest.raises(error, match=words):
        W4Linear.from_gptq(*arguments, **options)


def documented(tensors: dict[str, Tensor], name: str) -> np.ndarray[Any, Any]:
    """Return a layer's weight [I, O] by the formula of the format: (code - (zero + 1)) * scale."""
    word = {part: tensors[f"{name}.{part}"].numpy() for part in ("qweight", "qzeros", "g_idx")}
    scale_GO = tensors[f"{name}.scales"].float().numpy()
    shift = 4 * np.arange(8)
    code_IO = (word["qweight"][:, None, :] >> shift[None, :, None] & 15).reshape(-1, scale_GO.shape[1])
    zero_GO = (word["qzeros"][:, :, None] >> shift & 15).reshape(scale_GO.shape) + 1
    weight_IO: np.ndarray[Any, Any] = (code_IO - zero_GO[word["g_idx"]]) * scale_GO[word["g_idx"]]
    return weight_IO


@pytest.mark.parametrize("folder", ["gptq-w4", "gptq-w4-actorder"])
def test_a_checkpoint_of_gptqmodel_is_read_as_its_format_is_documented(folder: str) -> None:
    file = INTERCHANGE / folder / "model.safetensors"
    if not file.exists():
        pytest.skip("the checkpoints that other tools wrote are not here")
    tensors, names = load_file(file), ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    assert json.loads((file.parent / "config.json").read_text())["quantization_config"]["bits"] == 4
    original: dict[str, Tensor] = {}
    for part in demo_model().glob("*.safetensors"):
        original |= load_file(part)
    n_ordered = 0
    for name in (f"model.layers.{i}.{name}" for i in range(2) for name in names):
        stored = [tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
        layer = W4Linear.from_gptq(*stored)
        n_ordered += layer.order is not None
        assert np.array_equal(layer.dequantise().numpy(), documented(tensors, name).T.astype(np.float32))
        weight_OI = original[f"{name}.weight"].float()
        assert (layer.dequantise() - weight_OI).norm() < 0.2 * weight_OI.norm()
        x = torch.randn(5, layer.in_features)
        assert torch.allclose(layer(x), x @ layer.dequantise().T, atol=1e-4)
    assert (n_ordered > 0) == (folder == "gptq-w4-actorder")


def tiny_llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.15,
        attention_bias=True,
        attn_implementation="eager",
    )
    torch.manual_seed(5)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("group", [32, 128])
def test_a_model_of_transformers_with_replaced_layers_is_its_twin_with_rounded_weights(group: int) -> None:
    model = tiny_llama()
    twin = copy.deepcopy(model)
    ids = torch.randint(0, 320, (2, 40))
    assert replace_linears(model, group=group) == 2 * 7
    assert type(model.lm_head) is Linear
    for name, layer in model.named_modules():
        if isinstance(layer, W4Linear):
            rounded = restore_int4(*quantise_int4(twin.get_submodule(name).weight.detach(), group), group)
            twin.get_submodule(name).weight.data.copy_(rounded)
    with torch.inference_mode():
        found, expected = model(ids).logits, twin(ids).logits
        exact = tiny_llama()(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert float((found - exact).norm() / exact.norm()) > 0.01, "nothing was rounded"
    answers = [m.generate(ids, do_sample=False, max_new_tokens=8) for m in (model, twin)]
    assert torch.equal(*answers)


def test_layers_are_skipped_by_any_parts_of_their_names() -> None:
    def replaced(skip: tuple[str, ...]) -> int:
        return replace_linears(tiny_llama(), skip=skip)

    assert replaced(()) == 15
    assert replaced(("lm_head", "layers.0")) == 7
    assert replaced(("lm_head", "q_proj", "self_attn.k_proj")) == 10
    assert replaced(("layers.1.mlp.gate_proj", "gate")) == 14
    assert replaced(("model",)) == 1


def test_a_shared_layer_stays_shared_and_subclasses_stay() -> None:
    shared = linear(64, 64)
    inner = torch.nn.Sequential(shared, torch.nn.ReLU())
    model = torch.nn.ModuleDict(
        {"a": inner, "b": torch.nn.ModuleList([shared, inner]), "c": torch.nn.MultiheadAttention(64, 4)}
    )
    assert replace_linears(model) == 1
    assert isinstance(inner[0], W4Linear)
    assert model["b"][0] is inner[0]
    assert type(model["c"].out_proj) is not W4Linear
    assert replace_linears(model) == 0
    assert replace_linears(linear(64, 64)) == 0, "a layer itself has no inside"


def test_a_replaced_layer_is_in_the_mode_of_the_one_before() -> None:
    model = torch.nn.Sequential(linear(64, 64)).eval()
    replace_linears(model)
    assert not model[0].training


def test_the_layer_is_loaded_only_when_it_is_named() -> None:
    assert {"W4Linear", "replace_linears"} <= set(dir(sailfish))
    program = "import sys, sailfish; assert 'torch' not in sys.modules; sailfish.W4Linear; import torch"
    subprocess.run([sys.executable, "-c", program], check=True)


class OnCuda:
    """What the checks ask of activations on a GPU."""

    def __init__(self, dtype: torch.dtype, index: int) -> None:
        self.dtype, self.device = dtype, torch.device("cuda", index)

    def get_device(self) -> int:
        """Return the GPU they are on."""
        return self.device.index


@pytest.mark.parametrize(
    ("of_scale", "of_x", "words"),
    [
        (torch.bfloat16, torch.float32, "scales in bfloat16 .* bfloat16 or float16; these are in float32"),
        (torch.float32, torch.float32, "scales in float32 multiplies .* these are in float32"),
        (torch.bfloat16, torch.float16, "these are in float16 .bring model and activations to"),
        (torch.float16, torch.bfloat16, "scales in float16 .* these are in bfloat16"),
    ],
)
def test_on_cuda_activations_of_another_dtype_are_refused_in_words(
    of_scale: torch.dtype, of_x: torch.dtype, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(UserError, match=words):
        torch_op._check_cuda(OnCuda(of_x, 0), torch.zeros(1, dtype=of_scale))  # type: ignore[arg-type]


def test_a_process_multiplies_on_one_gpu_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    scale, current = torch.zeros(1, dtype=torch.bfloat16), 1

    def check(index: int) -> None:
        torch_op._check_cuda(OnCuda(torch.bfloat16, index), scale)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    torch_op._only_device.cache_clear()
    check(1)
    with pytest.raises(EngineError, match="run on cuda:1; these activations are on cuda:0"):
        check(0)
    current = 0
    for index in (0, 1):
        with pytest.raises(EngineError, match="the current device is cuda:0 .use one GPU a process"):
            check(index)
    torch_op._only_device.cache_clear()
