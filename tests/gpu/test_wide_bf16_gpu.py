"""The wide bfloat16 product agrees with float64 in every tile shape, and so does its activation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sailfish.kernels.cuda import linear8, wide_bf16

pytestmark = pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="Hopper's instructions")
SIZES = [(1, 48, 80), (65, 528, 1032), (300, 1008, 2064), (700, 6000, 512), (1100, 28672, 128)]
"""Tokens, outputs, inputs."""


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("shape", "splits"),
    [(shape, splits) for shape in linear8.SHAPES for splits in (1, 2) if splits == 1 or shape.can_split],
    ids=str,
)
def test_every_tile_shape_gives_the_product_and_gates_it(
    shape: linear8.Shape, splits: int, size: tuple[int, int, int]
) -> None:
    """Poisoned results show what a shape leaves unwritten."""
    n_tokens, n_out, n_in = size
    x_TI = torch.randn(n_tokens, n_in, device="cuda").bfloat16()
    weight_OI = (torch.randn(n_out, n_in, device="cuda") / n_in**0.5).bfloat16()
    bias_O = torch.randn(n_out, device="cuda").bfloat16()
    operands = (x_TI, weight_OI, (None, None, bias_O))
    y_TO, h_TM = (
        torch.full((n_tokens, n), float("nan"), device="cuda", dtype=torch.bfloat16)
        for n in (n_out, n_out // 2)
    )
    linear8.run(*operands, y_TO, shape, splits, None)
    truth = x_TI.double() @ weight_OI.double().T + bias_O.double()
    assert float((y_TO.double() - truth).norm() / truth.norm()) < 3e-3
    gate, up = (half.flatten(1) for half in y_TO.view(n_tokens, -1, 2, 8).unbind(2))
    linear8.run(*operands, h_TM, shape, splits, "silu")
    # The fast exponential moves a value over the middle between two bfloat16 now and then.
    torch.testing.assert_close(h_TM, F.silu(gate.double()).bfloat16() * up, rtol=2**-6, atol=1e-7)


@pytest.mark.parametrize("n_tokens", [0, 1, 33, 200, 2048])
def test_the_chosen_shape_follows_torch(n_tokens: int) -> None:
    x_TI = torch.randn(n_tokens, 1024, device="cuda").bfloat16()
    weight_OI = (torch.randn(4096, 1024, device="cuda") / 32).bfloat16()
    y_TO = F.linear(x_TI, weight_OI)
    torch.testing.assert_close(wide_bf16.linear_bf16(x_TI, weight_OI), y_TO, rtol=2e-2, atol=2e-2)
    gate, up = (half.flatten(1) for half in y_TO.view(n_tokens, 256, 2, 8).unbind(2))
    h_TM = wide_bf16.linear_bf16(x_TI, weight_OI, activation="gelu_tanh")
    torch.testing.assert_close(h_TM, F.gelu(gate, approximate="tanh") * up, rtol=4e-2, atol=4e-2)
