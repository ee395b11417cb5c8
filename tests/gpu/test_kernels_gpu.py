"""On the GPU, implementations meet their contracts, take no more memory than planned, and models agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_suite import DTYPES, SCENARIOS, attention, check, draw, load
from paged import PagedDriver
from twins import TWINS, load_truth, make_twin

from sailfish.kernels.contract import Case, Impl, StepBounds
from sailfish.kernels.table import OPS, implementations

pytestmark = pytest.mark.gpu

RUNS = [
    pytest.param(impl, scenario, dtype, id=f"{op}-{impl.name}-{scenario}-{dtype}")
    for op in OPS
    for impl in implementations(op)
    for scenario in SCENARIOS[op]
    for dtype in DTYPES
    if impl.rejects(
        Case(
            op=op,
            target="sm_90",
            dtype=dtype,
            softcap=1.0 if op == "attention" and "softcap" in scenario else None,
        )
    )
    is None
]
SHAPES = {
    "decode": ([(1, 100 + 30 * i) for i in range(64)], None),
    "decode in a window": ([(1, 100 + 30 * i) for i in range(64)], 512),
    "prompt": ([(4096, 4096)], None),
    "prompt in a window": ([(4096, 4096)], 1024),
    "chunk": ([(2048, 8192), (1, 8000)], None),
}


@pytest.mark.parametrize(("impl", "scenario", "dtype"), RUNS)
def test_an_implementation_agrees_with_the_reference(impl: Impl, scenario: str, dtype: str) -> None:
    check(impl.op, scenario, load(impl.entry), dtype, "cuda")


@pytest.mark.parametrize("name", ["cuda_sdpa", "cuda_math"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_takes_no_more_memory_than_planned(name: str, shape: str) -> None:
    impl = next(impl for impl in implementations("attention") if impl.name == name)
    lengths, window = SHAPES[shape]
    heads = (32, 8, 128)
    args = attention(lengths, window=window, heads=heads)(draw("bfloat16", "cuda"))
    case = Case(
        op="attention",
        target="sm_90",
        dtype="bfloat16",
        n_heads=heads[0],
        n_kv_heads=heads[1],
        head_dim=heads[2],
    )
    bounds = StepBounds(
        step_tokens=sum(n for n, _ in lengths),
        max_sequences=len(lengths),
        context_tokens=max(n for _, n in lengths),
    )
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = load(impl.entry)(*args)
    taken = torch.cuda.max_memory_allocated() - before - out.nbytes
    assert 0 < taken <= impl.workspace_bytes(case, bounds)


def test_a_new_length_costs_no_new_plan() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    cuda_sdpa = load("sailfish.kernels.plain.attention:cuda_sdpa")
    steps = [
        attention([(1, 500 + n), (1, 700), (90, 400 + n)], heads=(32, 8, 128))(draw("bfloat16", "cuda"))
        for n in range(20)
    ]
    with torch.profiler.profile(acc_events=True) as profile:
        for args in steps:
            cuda_sdpa(*args)
        torch.cuda.synchronize()
    assert not [event.key for event in profile.key_averages() if "cudnn" in event.key]


@pytest.mark.parametrize("family", TWINS)
def test_a_twin_gives_the_logits_of_transformers_on_the_cpu(family: str, tmp_path: Path) -> None:
    path = make_twin(family, tmp_path)
    tokens = torch.randint(256, (1, 150), generator=torch.Generator().manual_seed(1))
    driver = PagedDriver(path, seed=2, target="sm_90", device="cuda")
    logits_QV = driver.prefill({0: tokens[0].tolist()}, largest_chunk=70)[0]
    with torch.inference_mode():
        truth_QV = load_truth(path)(tokens).logits[0]
    # Twice the CPU's tolerance: two devices round differently, transformers' own runs on both as well.
    torch.testing.assert_close(logits_QV.cpu(), truth_QV, atol=2e-4, rtol=0)
