"""Attention captured once equals float64 attention over whatever steps it is replayed for."""

from __future__ import annotations

import random
from array import array
from functools import partial

import pytest
import torch
from test_prefill_attention_gpu import make_scene, truth

from sailfish.engine.packing import Batch
from sailfish.engine.spans import CapturedSpans
from sailfish.engine.step import RowRun, StepPlan
from sailfish.kernels.cuda.attention import attention
from sailfish.kernels.cuda.graph import Graph, new_pool

pytestmark = pytest.mark.gpu
N_TOKENS, CONTEXT = 512, 900
STEPS = [
    [(1, 400), (1, 1), (1, 33), (300, 640), (7, 7), (1, 90), (128, 128)],
    [(512, 512)],
    [(1, 20), (1, 900), (2, 2)],
    [(1, 64)] * 9 + [(250, 250)],
]
"""(queries, visible tokens) of each sequence; fewer tokens than are captured, or as many."""


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_captured_call_attends_in_steps_of_any_shape(head_dim: int) -> None:
    scenes = [make_scene(lengths, head_dim=head_dim, seed=i) for i, lengths in enumerate(STEPS)]
    kv = [tuple(t.contiguous() for t in (scene.kv.k_NPKE, scene.kv.v_NPKE)) for scene in scenes]
    k_NPKE, v_NPKE = (torch.cat([layer[i] for layer in kv]) for i in range(2))
    widest = max(scene.span.block_table_RW.shape[1] for scene in scenes)
    n_rows = sum(len(scene.span.block_table_RW) for scene in scenes) + 1
    table_RW = torch.zeros(n_rows, widest, dtype=torch.int32, device="cuda")
    spans = CapturedSpans(table_RW, most_tokens=N_TOKENS, context_tokens=CONTEXT, head_dim=head_dim)
    q_THE = torch.zeros(N_TOKENS, *scenes[0].q_THE.shape[1:], dtype=torch.bfloat16, device="cuda")
    scale = head_dim**-0.5
    layer = type(scenes[0].kv)(k_NPKE, v_NPKE)
    call = partial(attention, q_THE, layer, spans.span(N_TOKENS), scale, None, None)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        graph = Graph(call, new_pool())
        order = list(range(len(scenes))) * 2
        random.Random(head_dim).shuffle(order)
        for i in order:
            scene, lengths = scenes[i], STEPS[i]
            block_at = sum(len(layer[0]) for layer in kv[:i])
            row_at = sum(len(scene.span.block_table_RW) for scene in scenes[:i])
            rows = [row_at + row for row in scene.span.row_B.tolist()]
            found_RW = scene.span.block_table_RW
            table_RW[row_at : row_at + len(found_RW), : found_RW.shape[1]] = found_RW + block_at
            n_single = next(j for j, (n, _) in enumerate([*lengths, (0, 0)]) if n != 1)
            decodes = [(row, kv_len - 1) for row, (_, kv_len) in zip(rows, lengths, strict=True)][:n_single]
            runs = [RowRun(row, kv_len - n, n, True) for row, (n, kv_len) in zip(rows, lengths, strict=True)][
                n_single:
            ]
            plan = StepPlan(
                *(0, [], [], runs),
                array("i", [row for row, _ in decodes]).tobytes(),
                array("i", [start for _, start in decodes]).tobytes(),
            )
            q_THE.fill_(float("nan"))
            q_THE[: len(scene.q_THE)] = scene.q_THE
            spans.send(Batch.of(plan), scene.span.kv_len, scene.span.query_start)
            out_THE = graph.replay()[: len(scene.q_THE)].double()
            true_THE = truth(scene, scale, None, None)
            error = (out_THE - true_THE).abs()
            assert error.isfinite().all(), lengths
            assert error.max() < 2e-2 and error.norm() < 6e-3 * true_THE.norm(), lengths
    torch.cuda.synchronize()
