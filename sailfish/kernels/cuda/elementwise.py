"""The ops that treat each token alone as CUDA kernels."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from sailfish.kernels.contract import ActivationFormat, KvLayer, Quantised
from sailfish.kernels.cuda import program
from sailfish.kernels.cuda.elementwise_limits import BLOCK_THREADS, RAGGED_PARTS, most_parts
from sailfish.kernels.cuda.program import Defines, Variant
from sailfish.kernels.reference.quantised import EIGHT_BITS

TYPES = {torch.bfloat16: "bf16", torch.float32: "float"}
FORMATS: dict[ActivationFormat, int] = {"plain": 0, "int8": 1, "fp8": 2}
_CACHES = {torch.bfloat16: 0, torch.float32: 0, torch.int8: 1, torch.float8_e4m3fn: 2}
_ACTIVATIONS = {"silu": 1, "gelu_tanh": 2}
_FLAT_THREADS = 256
_PAIR_THREADS = 128
_CLUSTER = 8


def _defines(family: str, type_: str) -> Defines:
    of_type: Defines = (("TYPE", type_),)
    return (*of_type, ("PARTS", most_parts(family, type_ == "float"))) if family == "act_mul" else of_type


VARIANTS = (
    *(
        Variant(file, _defines(family, type_))
        for file, family in (
            ("norm.cu", "norm"),
            ("quantise.cu", "quantise"),
            ("activation.cu", "act_mul"),
            ("embed.cu", "embed"),
        )
        for type_ in TYPES.values()
    ),
    *(
        Variant("rope_write.cu", (("TYPE", type_), ("CACHE", cache_format)))
        for type_ in TYPES.values()
        for cache_format in sorted(set(_CACHES.values()))
    ),
)


def rms_norm(
    x_TD: Tensor, weight_D: Tensor, eps: float, plus_one: bool, out: ActivationFormat = "plain"
) -> Tensor | Quantised:
    """Meet `contract.RmsNorm`, over up to 16,384 elements."""
    return _norm(x_TD.contiguous(), None, None, weight_D, eps, plus_one, out)


def add_rms_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    plus_one: bool,
    out: ActivationFormat = "plain",
) -> tuple[Tensor | Quantised, Tensor]:
    """Meet `contract.AddRmsNorm`, over up to 16,384 elements."""
    x_TD, residual_TD = x_TD.contiguous(), residual_TD.contiguous()
    sum_TD = torch.empty_like(x_TD)
    return _norm(x_TD, residual_TD, sum_TD, weight_D, eps, plus_one, out), sum_TD


def quantise(x_TI: Tensor, out: ActivationFormat) -> Quantised:
    """Meet `contract.Quantise`, over up to 32,768 elements; takes any number of leading axes."""
    x_TI = x_TI.contiguous()
    values, scale_T = _result(x_TI.shape, x_TI, out)
    assert scale_T is not None, "a format of 8 bits"
    arguments = (x_TI, values, scale_T, x_TI.shape[-1], FORMATS[out])
    _launch_rows("quantise.cu", "quantise", x_TI.dtype, values, (x_TI,), arguments)
    return Quantised(values, scale_T, x_TI.dtype)


def rope_write(
    qkv_TX: Tensor,
    n_heads: int,
    q_norm_E: Tensor | None,
    k_norm_E: Tensor | None,
    eps: float,
    plus_one: bool,
    table_C2F: Tensor,
    position_T: Tensor,
    interleaved: bool,
    kv: KvLayer,
    slot_T: Tensor,
) -> Tensor:
    """Meet `contract.RopeWrite`, for heads of a multiple of 8 elements, 256 at most."""
    n_kv_heads, head_dim = kv.k_NPKE.shape[2:]
    assert kv.k_NPKE.is_contiguous() and kv.v_NPKE.is_contiguous(), "a slot is an offset into the whole cache"
    assert (q_norm_E is None) == (k_norm_E is None), "both or neither"
    qkv_TX = qkv_TX.contiguous()
    q_THE = qkv_TX.new_empty(len(qkv_TX), n_heads, head_dim)
    if not len(qkv_TX):
        return q_THE
    n_rotated = 2 * table_C2F.shape[-1]
    tensors = (qkv_TX, q_THE, q_norm_E, k_norm_E, table_C2F, position_T, slot_T)
    caches = (kv.k_NPKE, kv.k_scale_NPK, kv.v_NPKE, kv.v_scale_NPK)
    name, grid, threads, shape = _rope_launch(
        len(qkv_TX), n_heads, n_kv_heads, head_dim, n_rotated, interleaved, program.n_processors()
    )
    defines = (("TYPE", TYPES[qkv_TX.dtype]), ("CACHE", _CACHES[kv.k_NPKE.dtype]))
    program.kernel("rope_write.cu", name, defines).launch(
        grid, threads, (*tensors, *caches, *shape, eps, float(plus_one)), program.stream(), after=True
    )
    return q_THE


def act_mul(gate_up_T2M: Tensor, activation: str, out: ActivationFormat = "plain") -> Tensor | Quantised:
    """Meet `contract.ActMul`; in 8 bits over up to 32,768 elements, of float32 16,384."""
    gate_up_T2M = gate_up_T2M.contiguous()
    shape = (*gate_up_T2M.shape[:-1], gate_up_T2M.shape[-1] // 2)
    values, scale_T = _result(shape, gate_up_T2M, out)
    act = _ACTIVATIONS[activation]
    if scale_T is not None:
        arguments = (gate_up_T2M, values, scale_T, shape[-1], act, FORMATS[out])
        if _is_for_clusters(shape[-1], scale_T.numel(), gate_up_T2M):
            _launch_clusters(gate_up_T2M.dtype, shape[-1], scale_T.numel(), arguments)
            return Quantised(values, scale_T, gate_up_T2M.dtype)
        _launch_rows("activation.cu", "act_mul", gate_up_T2M.dtype, values, (gate_up_T2M,), arguments)
        return Quantised(values, scale_T, gate_up_T2M.dtype)
    if values.numel():
        is_whole = _is_whole(shape[-1], gate_up_T2M, values)
        program.kernel(
            "activation.cu", "act_mul_plain", _defines("act_mul", TYPES[gate_up_T2M.dtype])
        ).launch(
            (values.numel() // shape[-1], _n_flat_blocks(shape[-1])),
            _FLAT_THREADS,
            (gate_up_T2M, values, shape[-1], act, is_whole),
            program.stream(),
            after=True,
        )
    return values


def embed(token_T: Tensor, weight_VD: Tensor, scale: float) -> Tensor:
    """Meet `contract.Embed`."""
    width = weight_VD.shape[1]
    out_TD = weight_VD.new_empty(len(token_T), width)
    if len(token_T):
        program.kernel("embed.cu", "embed", _defines("embed", TYPES[weight_VD.dtype])).launch(
            (len(token_T), _n_flat_blocks(width)),
            _FLAT_THREADS,
            (
                token_T,
                weight_VD,
                out_TD,
                width,
                _rounded(scale, weight_VD.dtype),
                _is_whole(width, weight_VD),
            ),
            program.stream(),
            after=True,
        )
    return out_TD


def softcap(x_SV: Tensor, cap: float) -> Tensor:
    """Meet `contract.Softcap`."""
    x_SV = x_SV.contiguous()
    out_SV = torch.empty_like(x_SV)
    n = x_SV.numel()
    if n:
        program.kernel("embed.cu", "softcap", _defines("embed", TYPES[x_SV.dtype])).launch(
            (_n_flat_blocks(n),),
            _FLAT_THREADS,
            (x_SV, out_SV, ctypes.c_int64(n), cap, _is_whole(n, x_SV)),
            program.stream(),
            after=True,
        )
    return out_SV


def _rope_launch(
    n_tokens: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    n_rotated: int,
    interleaved: bool,
    n_processors: int,
) -> tuple[str, tuple[int, ...], int, tuple[int, ...]]:
    """Return the kernel that writes heads, its grid and threads, and the shape that it is told."""
    n_all, is_power = n_heads + 2 * n_kv_heads, head_dim >= 16 and head_dim & (head_dim - 1) == 0
    if is_power and n_rotated == head_dim and not interleaved:
        n_lanes, each = head_dim // 16, 1 if n_tokens <= 4 * n_processors else 2
        n_parts = _up(-(-n_all // each), max(1, 32 // n_lanes))  # whole warps a token
        n_blocks = -(-n_tokens * n_parts * n_lanes // _PAIR_THREADS)
        pairs = (n_tokens, n_heads, n_kv_heads, n_lanes, n_parts)
        return f"rope_write_pairs_{each}", (n_blocks,), _PAIR_THREADS, pairs
    n_lanes = 1 << (head_dim // 8 - 1).bit_length()
    each = 1 if n_tokens <= n_processors else 3  # heads of a thread, which share their angles
    n_parts = -(-n_all * n_lanes // (_FLAT_THREADS * each))
    shape = (n_heads, n_kv_heads, head_dim, n_lanes, n_rotated // 2, int(interleaved))
    return f"rope_write_{each}", (n_tokens, n_parts), _FLAT_THREADS, shape


def _norm(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    sum_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    plus_one: bool,
    out: ActivationFormat,
) -> Tensor | Quantised:
    values, scale_T = _result(x_TD.shape, x_TD, out)
    arguments = (x_TD, residual_TD, weight_D, sum_TD, values, scale_T, x_TD.shape[-1], eps, float(plus_one))
    read = (x_TD, weight_D) if residual_TD is None else (x_TD, weight_D, residual_TD)
    _launch_rows("norm.cu", "norm", x_TD.dtype, values, read, (*arguments, FORMATS[out]))
    return values if scale_T is None else Quantised(values, scale_T, x_TD.dtype)


def _result(shape: tuple[int, ...], like: Tensor, out: ActivationFormat) -> tuple[Tensor, Tensor | None]:
    """Return an empty result in its format, and empty scales if it has them."""
    if out == "plain":
        return like.new_empty(shape), None
    return like.new_empty(shape, dtype=EIGHT_BITS[out]), like.new_empty(shape[:-1], dtype=torch.float32)


def _is_for_clusters(width: int, n_rows: int, gate_up_T2M: Tensor) -> bool:
    """Say whether rows are few enough, and cut into whole parts, for a cluster of blocks each."""
    return (
        program.architecture() == "sm_90a"
        and 0 < n_rows <= program.n_processors() // 4
        and _is_whole(width // _CLUSTER, gate_up_T2M)
        and width % _CLUSTER == 0
        and width <= _CLUSTER * 8 * BLOCK_THREADS
    )


def _launch_clusters(dtype: torch.dtype, width: int, n_rows: int, arguments: tuple[object, ...]) -> None:
    kernel = program.kernel("activation.cu", "act_mul_cluster", _defines("act_mul", TYPES[dtype]))
    threads = -(-width // (_CLUSTER * 8 * 32)) * 32
    grid = (n_rows * _CLUSTER,)
    kernel.launch(grid, threads, arguments, program.stream(), after=True, cluster=_CLUSTER)


def _launch_rows(
    file: str,
    family: str,
    dtype: torch.dtype,
    out: Tensor,
    read: tuple[Tensor, ...],
    arguments: tuple[object, ...],
) -> None:
    """Launch a kernel of one block a row, with as many threads and parts a thread as the row needs."""
    if not out.numel():
        return
    width, most = out.shape[-1], most_parts(family, dtype == torch.float32)
    n_eights = -(-width // 8)
    assert n_eights <= most * BLOCK_THREADS, f"{family} of {width} elements"
    is_whole = _is_whole(width, *read)
    parts = next(n for n in (1, 2, 4) if n_eights <= n * BLOCK_THREADS) if is_whole else RAGGED_PARTS[family]
    if is_whole and out.numel() > width * program.n_processors():
        parts = min(2 * parts, most)  # with many rows, fewer threads with more loads each
    suffix = str(parts) if is_whole else "ragged"
    threads = -(-n_eights // (32 * parts)) * 32
    kernel = program.kernel(file, f"{family}_{suffix}", _defines(family, TYPES[dtype]))
    kernel.launch((out.numel() // width,), threads, arguments, program.stream(), after=True)


def _is_whole(width: int, *tensors: Tensor) -> bool:
    """Say whether every eight elements of rows of `width` lie aligned to 16 bytes."""
    return width % 8 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _n_flat_blocks(n: int) -> int:
    return -(-n // (8 * _FLAT_THREADS))


@cache
def _rounded(scale: float, dtype: torch.dtype) -> float:
    return torch.tensor(scale, dtype=dtype).item()
