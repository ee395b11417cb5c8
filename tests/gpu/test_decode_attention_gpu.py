"""Decode attention against explicit maths in float64: ragged lengths, every cache format, poisoned memory."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sailfish.kernels.contract import KvLayer
from sailfish.kernels.cuda import decode_attention, elementwise, program
from sailfish.kernels.cuda.decode_attention import decode

pytestmark = pytest.mark.gpu
FORMATS = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
NEVER_READ = 2**30
"""Fills block tables past each sequence's blocks: reading through it is an illegal access."""
RAGGED = (1, 17, 0, 16, 300, 15, 64, 1023, 33, 2, 128, 0, 511)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step's inputs, and the tokens of each sequence in float64."""

    q_BHE: Tensor
    kv: KvLayer
    block_table_RW: Tensor
    row_B: Tensor
    kv_len_B: Tensor
    lengths: tuple[int, ...]
    tokens: list[tuple[Tensor, Tensor]]


def make_step(
    lengths: tuple[int, ...],
    *,
    heads: tuple[int, int, int] = (8, 2, 128),
    kv: str = "bfloat16",
    page_tokens: int = 16,
    n_queries: int = 1,
    window: int | None = None,
    seed: int | None = None,
) -> Step:
    """Draw a step; slots that no query may see are NaN where the format has one, their scales always."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**31 if seed is None else seed)
    n_heads, n_kv_heads, head_dim = heads
    needs = [-(-n // page_tokens) for n in lengths]
    n_blocks = sum(needs) + 3
    free = torch.randperm(n_blocks, generator=generator).tolist()
    rows = torch.randperm(len(lengths) + 2, generator=generator)[: len(lengths)].to(torch.int32)
    table = torch.full((len(lengths) + 2, max(needs) + 1), NEVER_READ, dtype=torch.int32)
    caches, scales = [], []
    for _ in range(2):
        cache = torch.empty(n_blocks, page_tokens, n_kv_heads, head_dim, dtype=FORMATS[kv])
        cache.view(torch.int8).fill_(-1)  # NaN in all but int8
        caches.append(cache)
        scales.append(torch.full((n_blocks, page_tokens, n_kv_heads), float("nan")))
    tokens = []
    for b, (length, need) in enumerate(zip(lengths, needs, strict=True)):
        blocks = [free.pop() for _ in range(need)]
        table[rows[b], :need] = torch.tensor(blocks, dtype=torch.int32)
        first = 0 if window is None else max(0, length - n_queries + 1 - window)
        token = torch.arange(length)
        slots = (
            torch.tensor(blocks, dtype=torch.int64)[token // page_tokens] * page_tokens + token % page_tokens
        )
        pair = []
        for cache, scale in zip(caches, scales, strict=True):
            value = torch.randn(length, n_kv_heads, head_dim, generator=generator)
            stored = _stored(value, kv, generator)
            factor = torch.rand(length, n_kv_heads, generator=generator) * 0.03 + 0.01
            if kv == "bfloat16":
                factor = torch.ones_like(factor)
            if length:
                cache.flatten(0, 1)[slots[first:]] = stored[first:]
                scale.flatten(0, 1)[slots[first:]] = factor[first:]
            pair.append((stored.double() * factor.double().unsqueeze(-1)).cuda())
        tokens.append((pair[0], pair[1]))
    q = torch.randn(len(lengths) * n_queries, n_heads + 3, head_dim, generator=generator).bfloat16().cuda()
    planes = [None, None] if kv == "bfloat16" else [scale.cuda() for scale in scales]
    return Step(
        q_BHE=q[:, :n_heads],
        kv=KvLayer(caches[0].cuda(), caches[1].cuda(), planes[0], planes[1]),
        block_table_RW=table.cuda(),
        row_B=rows.cuda(),
        kv_len_B=torch.tensor(lengths, dtype=torch.int32).cuda(),
        lengths=lengths,
        tokens=tokens,
    )


def _stored(value: Tensor, kv: str, generator: torch.Generator) -> Tensor:
    if kv == "int8":
        return torch.randint(-128, 128, value.shape, generator=generator, dtype=torch.int8)
    if kv == "fp8":  # every magnitude, the subnormal ones too
        power = torch.randint(-12, 6, value.shape, generator=generator)
        return (value * 2.0**power).to(torch.float8_e4m3fn)
    return value.bfloat16()


def truth(step: Step, scale: float, window: int | None, softcap: float | None, n_queries: int = 1) -> Tensor:
    """Attend in float64, one sequence and query at a time."""
    out = torch.zeros(step.q_BHE.shape, dtype=torch.float64, device="cuda")
    for b, length in enumerate(step.lengths):
        k_SKE, v_SKE = step.tokens[b]
        for j in range(n_queries):
            position = length - n_queries + j
            first = 0 if window is None else max(0, position - window + 1)
            if position < 0:
                continue
            q_KGE = step.q_BHE[b * n_queries + j].double().unflatten(0, (k_SKE.shape[1], -1))
            score_KGS = torch.einsum("kge,ske->kgs", q_KGE, k_SKE[first : position + 1]) * scale
            if softcap is not None:
                score_KGS = torch.tanh(score_KGS / softcap) * softcap
            out_KGE = torch.einsum("kgs,ske->kge", score_KGS.softmax(-1), v_SKE[first : position + 1])
            out[b * n_queries + j] = out_KGE.flatten(0, 1)
    return out


def check(step: Step, window: int | None = None, softcap: float | None = None, *, n_queries: int = 1) -> None:
    """Compare one call with the truth, on poisoned memory."""
    scale = step.q_BHE.shape[-1] ** -0.5
    out = torch.full(step.q_BHE.shape, float("nan"), dtype=torch.bfloat16, device="cuda")
    decode(
        step.q_BHE,
        step.kv,
        step.block_table_RW,
        step.row_B,
        step.kv_len_B,
        max(step.lengths),
        scale,
        window,
        softcap,
        n_queries=n_queries,
        out_BHE=out,
    )
    expected = truth(step, scale, window, softcap, n_queries)
    assert (out.double() - expected).norm() <= 6e-3 * expected.norm()
    assert ((out.double() - expected).abs() <= 2e-2 * expected.abs().amax(-1, True) + 1e-6).all()


@pytest.mark.parametrize(
    ("head_dim", "kv"),
    [(e, kv) for e in decode_attention.HEAD_DIMS for kv in FORMATS if kv == "bfloat16" or e % 32 == 0],
)
def test_ragged_sequences_are_attended_in_every_format(head_dim: int, kv: str) -> None:
    """Empty rows yield zeros."""
    check(make_step(RAGGED, heads=(8, 2, head_dim), kv=kv))


@pytest.mark.parametrize("page_tokens", decode_attention.PAGE_TOKENS)
@pytest.mark.parametrize("heads", [(4, 4), (7, 1), (6, 2), (16, 2), (12, 1), (16, 1), (32, 8)])
def test_any_number_of_heads_shares_keys(heads: tuple[int, int], page_tokens: int) -> None:
    """Groups that fill no tile, one, and more than one; pages of one tile and of several."""
    check(make_step(RAGGED, heads=(*heads, 128), page_tokens=page_tokens))


@pytest.mark.parametrize(
    "lengths",
    [(1,), (16,), (17,), (128,), (1000,), (8192,), (20000,), (5000, 3), (700,) * 5, (64,) * 300, (0, 0)],
    ids=lambda lengths: f"{len(lengths)}x{lengths[0]}",
)
@pytest.mark.parametrize("kv", FORMATS)
def test_work_is_divided_whatever_the_lengths(lengths: tuple[int, ...], kv: str) -> None:
    """One long sequence over all blocks, many short ones in each, and nothing at all."""
    check(make_step(lengths, heads=(32, 8, 128), kv=kv))


@pytest.mark.parametrize("window", [1, 5, 16, 100, 4096])
@pytest.mark.parametrize("n_queries", [1, 3])
def test_a_window_hides_what_lies_before_it(window: int, n_queries: int) -> None:
    """Tokens before the first query's window may lie in blocks that are another's by now."""
    lengths = tuple(max(n, n_queries) for n in RAGGED)
    step = make_step(lengths, n_queries=n_queries, window=window)
    check(step, window, n_queries=n_queries)


@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_scores_are_capped(softcap: float) -> None:
    """Caps that bend most scores and few."""
    check(make_step(RAGGED), softcap=softcap)


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("n_queries", [2, 4, 5, 8])
def test_several_queries_see_up_to_themselves(n_queries: int, kv: str) -> None:
    """A query before the first token, of a sequence shorter than its queries, yields zeros."""
    check(make_step(RAGGED, heads=(32, 8, 128), n_queries=n_queries, kv=kv), n_queries=n_queries)


def test_large_scores_do_not_overflow() -> None:
    """Scores of thousands, rising and falling along the sequence, as the references follow them."""
    step = make_step((900, 37, 3000))
    factor = torch.linspace(0.1, 60, step.kv.k_NPKE.shape[0], device="cuda").bfloat16()
    step.kv.k_NPKE.mul_(factor[:, None, None, None])
    for b, (k_SKE, _) in enumerate(step.tokens):
        blocks = step.block_table_RW[step.row_B[b], : -(-step.lengths[b] // 16)]
        k_SKE.copy_(step.kv.k_NPKE[blocks].flatten(0, 1)[: step.lengths[b]].double())
    check(step)


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("n_queries", [1, 4])
def test_cards_before_hopper_run_the_same(n_queries: int, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their variant, as PTX that the driver compiles, with neither copy engine nor early start."""
    for module in (program, decode_attention):
        monkeypatch.setattr(module, "architecture", lambda: "compute_80")
    program.kernel.cache_clear()
    check(make_step(RAGGED, heads=(32, 8, 128), n_queries=n_queries, kv=kv), n_queries=n_queries)
    check(make_step((5000, 0, 300), heads=(8, 8, 64), n_queries=n_queries, kv=kv), n_queries=n_queries)
    program.kernel.cache_clear()


def test_more_sequences_than_a_launch_takes_are_served() -> None:
    """The batch is cut; partial results of one launch do not leak into the next."""
    check(make_step(tuple(1 + 37 * i % 90 for i in range(700))))


@pytest.mark.parametrize("settled", [False, True])
def test_a_captured_launch_serves_any_lengths(settled: bool) -> None:
    """One graph, replayed with other lengths, tables and values, leaves nothing behind in the workspace."""
    shapes = [(4000, 900, 2), (3, 3999, 0), (100, 200, 300), (4000, 4000, 4000)]
    first = make_step(shapes[0])
    width = 4000 // 16 + 1
    n_blocks = 3 * width
    k, v = (torch.empty(n_blocks, 16, 2, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    table = torch.zeros(5, width, dtype=torch.int32, device="cuda")
    row, length = first.row_B.clone(), first.kv_len_B.clone()
    q = torch.empty(3, 8, 128, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)

    def call() -> None:
        for _ in range(3):
            decode(
                *(q, KvLayer(k, v), table, row, length, 4000, 128**-0.5, None, None),
                is_settled=settled,
                out_BHE=out,
            )

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for lengths in shapes * 5:
        step = make_step(lengths)
        n, w = step.kv.k_NPKE.shape[0], step.block_table_RW.shape[1]
        k[:n], v[:n], table[:, :w] = step.kv.k_NPKE, step.kv.v_NPKE, step.block_table_RW
        row.copy_(step.row_B)
        length.copy_(step.kv_len_B)
        q.copy_(step.q_BHE)
        out.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        expected = truth(step, 128**-0.5, None, None)
        assert (out.double() - expected).norm() / expected.norm() < 6e-3


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("heads", [(32, 8, 128), (8, 8, 64), (4, 1, 256)], ids=str)
@pytest.mark.parametrize("lengths", [(1,), (17, 16), (700,), (33, 2000, 5), (40,) * 90], ids=str)
def test_the_newest_token_may_be_written_just_ahead(
    lengths: tuple[int, ...], heads: tuple[int, int, int], kv: str
) -> None:
    """What its slot held before, which is read too early on purpose, is never seen."""
    n_heads, n_kv_heads, head_dim = heads
    step = make_step(lengths, heads=heads, kv=kv)
    last = torch.tensor(lengths, device="cuda") - 1
    blocks = step.block_table_RW[step.row_B.long(), last // 16].long()
    slot = blocks * 16 + last % 16
    qkv = torch.randn(len(lengths), (n_heads + 2 * n_kv_heads) * head_dim, device="cuda").bfloat16()
    angle = torch.rand(int(last.max()) + 1, head_dim // 2, device="cuda") * 6
    table = torch.stack((angle.cos(), angle.sin()), 1)
    busy, weight = (
        torch.randn(4096, 4096, device="cuda").bfloat16(),
        torch.ones(4096, device="cuda").bfloat16(),
    )
    rest = (step.block_table_RW, step.row_B, step.kv_len_B, max(lengths), head_dim**-0.5, None, None)
    outs = [torch.empty(len(lengths), n_heads, head_dim, device="cuda").bfloat16() for _ in range(8)]

    def call(settled: bool) -> None:
        for out in outs:
            for cache in (step.kv.k_NPKE, step.kv.v_NPKE):
                cache.view(torch.int8).flatten(0, 1).index_fill_(0, slot, -1)  # NaN in all but int8
            for scale in (step.kv.k_scale_NPK, step.kv.v_scale_NPK):
                if scale is not None:
                    scale.flatten(0, 1).index_fill_(0, slot, float("nan"))
            elementwise.rms_norm(busy, weight, 1e-5, False)  # lets those behind it begin while it runs
            q = elementwise.rope_write(
                qkv, n_heads, None, None, 1e-5, False, table, last, False, step.kv, slot
            )
            decode(q, step.kv, *rest, is_settled=settled, out_BHE=out)

    call(False)
    expected = outs[0].clone()
    assert bool(expected.isfinite().all())
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call(True)
    for _ in range(3):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(out, expected) for out in outs)
