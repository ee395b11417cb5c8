"""Makes the 4-bit product an op of torch, chosen by shape, rows and device, which torch can trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, library

from sailfish.base.errors import EngineError, UserError
from sailfish.kernels.choose import bind_linear, known_target
from sailfish.kernels.contract import Case
from sailfish.kernels.cuda.linear_limits import KERNEL_DTYPES
from sailfish.kernels.int4 import Int4Weight, dequantise

_ALIGNED_BYTES = 16
"""Where activations must begin for a kernel; torch allocates so, a slice may begin elsewhere."""


def _linear_int4(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias_O: Tensor | None,
    n_out: int,
    n_in: int,
    group: int,
) -> Tensor:
    if x.shape[-1:] != (n_in,):
        raise UserError(f"activations {tuple(x.shape)} do not fit a weight of {n_in} inputs")
    if x.is_cuda:
        _check_cuda(x, scale)
    x_TI = x.reshape(-1, n_in).contiguous()
    if len(x_TI) == 0:
        return x.new_empty(*x.shape[:-1], n_out)
    if x.is_cuda and x_TI.data_ptr() % _ALIGNED_BYTES:
        x_TI = x_TI.clone()
    if bias_O is not None:
        bias_O = bias_O.to(x.dtype)
    weight = Int4Weight(packed=packed, scale=scale, zero=zero, n_out=n_out, n_in=n_in, group=group)
    linear = _bound(x.device, x.dtype, n_out, n_in, group)
    y_TO: Tensor = linear(x_TI, weight, bias_O)
    return y_TO.view(*x.shape[:-1], n_out)


@cache
def _bound(
    device: torch.device, dtype: torch.dtype, n_out: int, n_in: int, group: int
) -> Callable[[Tensor, Int4Weight, Tensor | None], Tensor]:
    """Return what multiplies a weight of this shape on this device, by rows."""
    target = "cpu"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        target = known_target(f"sm_{major}{minor}")
    case = Case(op="linear_int4", target=target, dtype=_name(dtype), n_out=n_out, n_in=n_in, group=group)
    return bind_linear(case)


def _check_cuda(x: Tensor, scale: Tensor) -> None:
    if _name(x.dtype) not in KERNEL_DTYPES or x.dtype != scale.dtype:
        raise UserError(
            f"on CUDA a 4-bit weight with scales in {_name(scale.dtype)} multiplies activations in that "
            f"dtype, {' or '.join(KERNEL_DTYPES)}; these are in {_name(x.dtype)}",
            hint="bring model and activations to torch.bfloat16 or torch.float16",
        )
    if not x.get_device() == torch.cuda.current_device() == _only_device():
        raise EngineError(
            f"the kernels of this process run on cuda:{_only_device()}; these activations are on {x.device}, "
            f"and the current device is cuda:{torch.cuda.current_device()}",
            hint="use one GPU a process, and torch.cuda.set_device before the first product",
        )


@cache
def _only_device() -> int:
    """Return the device that was current at the first product: code is compiled and loaded for it only."""
    return torch.cuda.current_device()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape_of_product(x: Tensor, *weight: Any) -> Tensor:
    n_out: int = weight[4]
    return x.new_empty(*x.shape[:-1], n_out)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4])
    ctx.sizes = inputs[5:]


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (packed, scale, zero), (n_out, n_in, group) = ctx.saved_tensors, ctx.sizes
    weight = Int4Weight(packed=packed, scale=scale, zero=zero, n_out=n_out, n_in=n_in, group=group)
    return (gradient @ dequantise(weight, gradient.dtype), *(None for _ in range(7)))


_OP = "sailfish::linear_int4"
library.define(
    _OP,
    "(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, int n_out, int n_in, int group) "
    "-> Tensor",
)
library.impl(_OP, ("cpu", "cuda"), _linear_int4)
library.register_fake(_OP, _shape_of_product)
library.register_autograd(_OP, _gradient, setup_context=_keep)
multiply_int4: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, int, int, int], Tensor]
multiply_int4 = torch.ops.sailfish.linear_int4.default
"""Return x @ weight.T + bias for any leading axes of x, in x's dtype; the weight comes as its parts.

Takes x, packed, scale, zero, bias, n_out, n_in, group. On CUDA x is in the dtype of the scales, bfloat16 or
float16; on the CPU in any float dtype. Gradients reach x only. UserError where x does not fit.
"""
