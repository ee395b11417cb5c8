"""Paged prefill attention equals float64 attention on ragged, packed, windowed, capped and 8-bit cases."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sailfish.kernels.contract import AttentionSpan, KvLayer
from sailfish.kernels.cuda import program
from sailfish.kernels.cuda.driver import Kernel, Library
from sailfish.kernels.cuda.prefill_attention import HEAD_DIMS, prefill
from sailfish.kernels.cuda.program import Defines, machine_code

pytestmark = pytest.mark.gpu

RAGGED = [(1, 1), (7, 7), (128, 128), (129, 129), (64, 64), (33, 500), (1, 300), (200, 329), (0, 50)]
"""(queries, visible tokens) of each sequence."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One step over one layer."""

    q_THE: Tensor
    kv: KvLayer
    span: AttentionSpan
    plain: list[tuple[Tensor, Tensor]]
    """K and V of each sequence as float64, [kv_len, K, E]."""


def make_scene(
    lengths: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (8, 2),
    head_dim: int = 128,
    page_tokens: int = 16,
    kv_dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    loudness: float = 1.0,
) -> Scene:
    """Draw a step over shuffled pages; all that is no visible token is NaN; q and cache are strided.

    Every third of the first 150 keys is multiplied by `loudness`.
    """
    generator = torch.Generator("cuda").manual_seed(seed)
    n_heads, n_kv_heads = heads
    n_pages = [-(-kv_len // page_tokens) for _, kv_len in lengths]
    ids = random.Random(seed).sample(range(1, sum(n_pages) + 9), sum(n_pages))
    table = torch.zeros(len(lengths) + 3, max(n_pages) + 2, dtype=torch.int32)  # page 0 is all NaN
    rows = random.Random(seed + 1).sample(range(len(table)), len(lengths))
    shape = (sum(n_pages) + 9, 3, page_tokens, n_kv_heads, head_dim)
    raw = torch.full(shape, float("nan"), device="cuda", dtype=torch.bfloat16)[:, 1:]
    scales = torch.full(shape[:-1], float("nan"), device="cuda")[:, 1:]
    cache = raw if kv_dtype == torch.bfloat16 else torch.full_like(raw, 127).to(kv_dtype)
    plain = []
    for (_, kv_len), row, n in zip(lengths, rows, n_pages, strict=True):
        own = [ids.pop() for _ in range(n)]
        table[row, :n] = torch.tensor(own)
        slots = torch.arange(kv_len, device="cuda")
        page = torch.tensor(own, device="cuda")[slots // page_tokens] if n else slots
        both = []
        for i in range(2):
            x_SKE = torch.randn(kv_len, n_kv_heads, head_dim, device="cuda", generator=generator)
            x_SKE[: 150 if i == 0 else 0 : 3] *= loudness
            if kv_dtype == torch.bfloat16:
                stored_SKE, scale_SK = x_SKE.to(kv_dtype), torch.ones(x_SKE.shape[:2], device="cuda")
            else:
                top = 127.0 if kv_dtype == torch.int8 else 448.0
                scale_SK = x_SKE.abs().amax(-1) / top
                scaled = x_SKE / scale_SK[..., None]
                stored_SKE = (scaled.round() if kv_dtype == torch.int8 else scaled).to(kv_dtype)
                scales[page, i, slots % page_tokens] = scale_SK
            cache[page, i, slots % page_tokens] = stored_SKE
            both.append(stored_SKE.double() * scale_SK[..., None].double())
        plain.append((both[0], both[1]))
    query_start = [0]
    for n, _ in lengths:
        query_start.append(query_start[-1] + n)
    qkv = torch.randn(query_start[-1], n_heads + 3, head_dim, device="cuda", generator=generator)
    scaled_kv = kv_dtype != torch.bfloat16
    return Scene(
        q_THE=qkv.to(torch.bfloat16)[:, :n_heads],
        kv=KvLayer(cache[:, 0], cache[:, 1], *((scales[:, 0], scales[:, 1]) if scaled_kv else (None, None))),
        span=AttentionSpan(
            block_table_RW=table.cuda(),
            row_B=torch.tensor(rows, dtype=torch.int32, device="cuda"),
            query_start=tuple(query_start),
            kv_len=tuple(kv_len for _, kv_len in lengths),
            kv_len_B=torch.tensor([kv_len for _, kv_len in lengths], dtype=torch.int32, device="cuda"),
            query_start_B1=torch.tensor(query_start, dtype=torch.int32, device="cuda"),
        ),
        plain=plain,
    )


def truth(scene: Scene, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """Return attention in float64, one sequence and all its scores at a time."""
    out_THE = torch.empty(scene.q_THE.shape, dtype=torch.float64, device="cuda")
    starts = scene.span.query_start
    for (k_SKE, v_SKE), start, end in zip(scene.plain, starts, starts[1:], strict=False):
        q_QHE = scene.q_THE[start:end].double()
        n_shared = q_QHE.shape[1] // k_SKE.shape[1]
        score_HQS = torch.einsum("qhe,she->hqs", q_QHE, k_SKE.repeat_interleave(n_shared, 1)) * scale
        if softcap is not None:
            score_HQS = torch.tanh(score_HQS / softcap) * softcap
        key_S = torch.arange(len(k_SKE), device="cuda")
        query_Q1 = key_S[len(k_SKE) - (end - start) :, None]
        hidden_QS = key_S > query_Q1
        if window is not None:
            hidden_QS |= key_S <= query_Q1 - window
        weight_HQS = score_HQS.masked_fill(hidden_QS, float("-inf")).softmax(-1)
        out_THE[start:end] = torch.einsum("hqs,she->qhe", weight_HQS, v_SKE.repeat_interleave(n_shared, 1))
    return out_THE


def check(scene: Scene, *, scale: float, window: int | None = None, softcap: float | None = None) -> None:
    """Compare with the truth: 2e-2 at most at any place, 6e-3 of the norm in all."""
    out_THE = torch.full_like(scene.q_THE, float("nan"), memory_format=torch.contiguous_format)
    out_THE = out_THE.contiguous()
    assert prefill(scene.q_THE, scene.kv, scene.span, scale, window, softcap, out_THE=out_THE) is out_THE
    true_THE = truth(scene, scale, window, softcap)
    error = (out_THE.double() - true_THE).abs()
    assert error.isfinite().all()
    assert error.max() < 2e-2
    assert error.norm() < 6e-3 * true_THE.norm()


@pytest.mark.parametrize("page_tokens", [8, 16, 32, 64])
@pytest.mark.parametrize("heads", [(8, 2), (4, 4), (14, 2), (12, 2), (16, 1), (6, 2)], ids=str)
def test_ragged_sequences_are_attended_to(heads: tuple[int, int], page_tokens: int) -> None:
    """Chunks after a prefix, single queries, no queries; every way to pack heads."""
    check(make_scene(RAGGED, heads=heads, page_tokens=page_tokens, seed=page_tokens), scale=0.09)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_every_head_width_and_cache_works(head_dim: int, kv_dtype: torch.dtype) -> None:
    """Also with a window, and with a softcap."""
    scene = make_scene(RAGGED, head_dim=head_dim, kv_dtype=kv_dtype, seed=head_dim)
    check(scene, scale=head_dim**-0.5)
    check(scene, scale=head_dim**-0.5, window=100)
    check(scene, scale=head_dim**-0.5, softcap=2.0)


@pytest.mark.parametrize("window", [1, 16, 63, 64, 65, 128, 200, 10_000])
def test_a_window_hides_what_lies_before_it(window: int) -> None:
    """Rows of one tile may see no key in common."""
    check(make_scene(RAGGED, heads=(4, 4), seed=window), scale=0.1, window=window)


@pytest.mark.parametrize("lengths", [[(2048, 2048)], [(300, 4000), (1, 5000)], [(128, 128)] * 64], ids=str)
def test_long_and_many_prompts(lengths: list[tuple[int, int]]) -> None:
    """Sizes of a real step."""
    check(make_scene(lengths, heads=(32, 8), page_tokens=16), scale=128**-0.5)


def test_large_scores_do_not_overflow() -> None:
    """Scores of several hundred, whose exponentials are infinite."""
    check(make_scene([(200, 300)]), scale=20.0)


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("loudness", [3.0, 30.0, 300.0])
def test_scores_may_outgrow_those_seen_first(loudness: float, window: int | None) -> None:
    """Keys are read from the last to the first, and weights are relative to the peak of the last."""
    check(make_scene([*RAGGED, (500, 700)], loudness=loudness), scale=0.3, window=window)


def test_sequences_before_the_first_are_left_alone() -> None:
    """They belong to the decode kernel."""
    scene = make_scene([(1, 40), (1, 90), (70, 100)])
    out_THE = torch.full(scene.q_THE.shape, 7.0, dtype=torch.bfloat16, device="cuda")
    prefill(scene.q_THE, scene.kv, scene.span, 0.1, None, None, first=2, out_THE=out_THE)
    assert (out_THE[:2] == 7).all()
    assert (out_THE[2:].double() - truth(scene, 0.1, None, None)[2:]).abs().max() < 2e-2


def test_a_row_that_pads_a_captured_step_yields_zeros() -> None:
    """Its length is 0 on the device only."""
    scene = make_scene([(4, 40), (5, 90)])
    scene.span.kv_len_B[1] = 0
    out_THE = prefill(scene.q_THE, scene.kv, scene.span, 0.1, None, None)
    assert (out_THE[4:] == 0).all()
    assert (out_THE[:4].double() - truth(scene, 0.1, None, None)[:4]).abs().max() < 2e-2


def test_a_step_with_more_runs_than_one_launch_takes() -> None:
    """A thousand short sequences."""
    check(make_scene([(1 + i % 5, 3 + i % 40 + i % 5) for i in range(1000)], heads=(4, 2)), scale=0.1)


def test_a_captured_graph_replays_with_new_data() -> None:
    """Nothing is left from one replay to the next."""
    scene = make_scene([(40, 300), (150, 150)])
    prefill(scene.q_THE, scene.kv, scene.span, 0.1, None, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            out_THE = prefill(scene.q_THE, scene.kv, scene.span, 0.1, None, None)
    for _ in range(3):
        scene.q_THE.normal_()
        out_THE.fill_(float("nan"))
        graph.replay()
        assert (out_THE.double() - truth(scene, 0.1, None, None)).abs().max() < 2e-2


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_ptx_for_the_oldest_architecture_is_right(
    head_dim: int, kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a card newer than all we compile for would run."""

    def old(file: str, name: str, defines: Defines = ()) -> Kernel:
        return Kernel(Library(machine_code(file, "compute_80", dict(defines))), name, name)

    monkeypatch.setattr(program, "kernel", old)
    monkeypatch.setattr(program, "architecture", lambda: "compute_80")
    check(make_scene(RAGGED, head_dim=head_dim, kv_dtype=kv_dtype), scale=0.1, window=200)
