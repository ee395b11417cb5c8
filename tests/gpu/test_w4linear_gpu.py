"""W4Linear on a GPU: the kernels that an engine would choose, in both 16-bit dtypes, in any torch model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import Linear

from sailfish import W4Linear, replace_linears
from sailfish.base.errors import EngineError, SailfishError
from sailfish.kernels.cuda.driver import launches

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 6e-4}
"""Relative error of the result's norm: what rounding to 16 bits makes."""
DTYPES = list(TOLERANCE)
SHAPES = [(4096, 4096), (1088, 1000), (200, 17), (72, 24), (100, 50), (7, 5)]
"""Inputs and outputs; rows of 100 and 7 inputs do not begin at 16 bytes."""
STREAM, WIDE = "stream_int4", "wide_linear_int4"


def _layer(
    n_in: int, n_out: int, dtype: torch.dtype, group: int | None = 128, symmetric: bool = True
) -> W4Linear:
    return W4Linear.from_linear(Linear(n_in, n_out, device="cuda", dtype=dtype), group, symmetric)


def _error(y: Tensor, x: Tensor, layer: W4Linear) -> float:
    truth = x.double() @ layer.dequantise().double().T
    if layer.bias is not None:
        truth += layer.bias.double()
    assert y.shape == truth.shape and y.dtype == x.dtype
    return float((y.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128, None])
@torch.no_grad()
def test_every_kind_of_layer_gives_the_product(
    group: int | None, symmetric: bool, dtype: torch.dtype
) -> None:
    for n_in, n_out in SHAPES:
        layer = _layer(n_in, n_out, dtype, group, symmetric)
        for leading in ((), (1,), (2, 8), (17,), (3, 50)):
            x = torch.randn(*leading, n_in, dtype=dtype, device="cuda")
            assert _error(layer(x), x, layer) < TOLERANCE[dtype], (n_in, n_out, leading)
        assert layer(torch.empty(0, n_in, dtype=dtype, device="cuda")).shape == (0, n_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_few_rows_are_streamed_and_many_are_widened(dtype: torch.dtype) -> None:
    layer = _layer(512, 256, dtype)
    for n, kernel in ((1, STREAM), (16, STREAM), (17, WIDE), (300, WIDE)):
        before = launches.copy()
        layer(torch.randn(n, 512, dtype=dtype, device="cuda"))
        assert launches - before == {kernel: 1}, n


@torch.no_grad()
def test_a_gpu_packs_what_the_cpu_packs() -> None:
    plain = Linear(320, 72)
    found = W4Linear.from_linear(plain.cuda(), 64, False).dequantise().cpu()
    expected = W4Linear.from_linear(plain.cpu(), 64, False).dequantise()
    # The search compares sums, which depend on their order.
    assert float((found - expected).norm() / expected.norm()) < 1e-2


@torch.no_grad()
def test_activations_that_are_not_contiguous_or_aligned_are_copied() -> None:
    layer = _layer(192, 40, torch.bfloat16)
    flat = torch.randn(64 * 400, dtype=torch.bfloat16, device="cuda")
    for n in (4, 40):
        wide = flat[: n * 400].view(n, 400)
        for x in (wide[:, 1:193], wide[:, ::2][:, :192], flat[1 : 1 + n * 192].view(n, 192)):
            assert _error(layer(x), x, layer) < TOLERANCE[torch.bfloat16]


@torch.no_grad()
def test_inputs_in_an_order_of_their_own_are_put_in_order() -> None:
    layer = _layer(256, 64, torch.float16)
    layer.register_buffer("order", torch.randperm(256, device="cuda"))
    x = torch.randn(5, 256, dtype=torch.float16, device="cuda")
    assert _error(layer(x), x, layer) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    ("of_layer", "of_x"), [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str
)
def test_other_dtypes_are_refused_in_words(of_layer: torch.dtype, of_x: torch.dtype) -> None:
    layer = _layer(128, 64, of_layer)
    with pytest.raises(SailfishError, match="these are in"):
        layer(torch.randn(2, 128, dtype=of_x, device="cuda"))
    assert layer.to(torch.bfloat16)(torch.randn(2, 128, device="cuda").bfloat16()).isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_is_refused_in_words() -> None:
    _layer(128, 64, torch.bfloat16)(torch.randn(2, 128, device="cuda").bfloat16())
    layer = _layer(128, 64, torch.bfloat16).to("cuda:1")
    with pytest.raises(EngineError, match="run on cuda:0; these activations are on cuda:1"):
        layer(torch.randn(2, 128, device="cuda:1").bfloat16())


def test_gradients_pass_through_to_the_activations() -> None:
    layer = _layer(256, 64, torch.bfloat16)
    x = torch.randn(20, 256, device="cuda").bfloat16().requires_grad_()
    gradient = torch.randn(20, 64, device="cuda").bfloat16()
    layer(x).backward(gradient)
    truth = gradient.double() @ layer.dequantise().double()
    assert x.grad is not None
    assert float((x.grad.double() - truth).norm() / truth.norm()) < 1e-2


def _tiny_llama(dtype: torch.dtype) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.06,
        attn_implementation="eager",
    )
    torch.manual_seed(5)
    return transformers.LlamaForCausalLM(config).eval().to("cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_a_model_of_transformers_with_replaced_layers_is_its_twin_with_rounded_weights(
    dtype: torch.dtype,
) -> None:
    model = _tiny_llama(dtype)
    twin = copy.deepcopy(model).float()
    assert replace_linears(model) == 14
    for name, layer in model.named_modules():
        if isinstance(layer, W4Linear):
            twin.get_submodule(name).weight.copy_(layer.dequantise())
    for n in (1, 40):
        ids = torch.randint(0, 320, (2, n), device="cuda")
        found, expected = model(ids).logits.float(), twin(ids).logits
        assert float((found - expected).norm() / expected.norm()) < (
            0.03 if dtype == torch.bfloat16 else 0.005
        )


@torch.no_grad()
def test_a_captured_model_follows_its_inputs() -> None:
    model = torch.nn.Sequential(Linear(512, 1536), torch.nn.SiLU(), Linear(1536, 512)).cuda().bfloat16()
    assert replace_linears(model) == 2
    for n in (4, 40):
        x = torch.randn(n, 512, device="cuda").bfloat16()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        for _ in range(5):
            x.normal_()
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, model(x))


@torch.no_grad()
def test_the_compiler_keeps_a_model_whole() -> None:
    model = torch.nn.Sequential(Linear(512, 256), torch.nn.SiLU(), Linear(256, 512)).cuda().bfloat16()
    replace_linears(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for n in (4, 40):
        x = torch.randn(n, 512, device="cuda").bfloat16()
        assert torch.equal(compiled(x), model(x))
