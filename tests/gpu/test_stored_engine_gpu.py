"""Checkpoints that come quantised, on a GPU: its kernels give the logits of the stored numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from paged import PagedDriver
from stored_twins import FP8, FP8_STATIC, INT8, INT8_STATIC, store_twin, stored_truth

from sailfish.build.builder import build_engine
from sailfish.checkpoint.formats.scheme import LinearScheme
from sailfish.data import demo_model

G128 = LinearScheme(layout="pack-quantized", bits=4, strategy="group", group=128)
pytestmark = pytest.mark.gpu
MOST = {"int4": 0.02, "plain": 0.02, "int8": 0.05, "fp8": 0.1}
"""The median of relative errors; bfloat16 activations round to the other 8-bit number often enough."""


@pytest.mark.parametrize(
    ("scheme", "format"),
    [
        (G128, "int4"),
        (replace(G128, group=32, symmetric=False), "int4"),
        (replace(G128, strategy="channel", group=None, symmetric=False), "int4"),
        (replace(G128, layout="gptq", act_order=True), "int4"),
        (replace(G128, bits=8), "plain"),
        (INT8, "int8"),
        (INT8_STATIC, "int8"),
        (FP8, "fp8"),
        (FP8_STATIC, "fp8"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.layout} {value.group} {value.symmetric}",
)
def test_the_chosen_kernels_give_the_logits_of_the_stored_numbers(
    scheme: LinearScheme, format: str, tmp_path: Path
) -> None:
    source = store_twin(demo_model(), tmp_path / "source", {"": scheme})
    engine = build_engine(source, tmp_path / "engine")
    assert engine.manifest.plan.dtype == "bfloat16"
    assert engine.manifest.plan.formats.layers == format
    prompts = {i: [(997 * i + 31 * j) % 8000 for j in range(1 + 40 * i)] for i in range(4)}
    driver = PagedDriver(source, seed=1, device="cuda", dtype="bfloat16", engine=engine)
    found = driver.prefill(prompts, largest_chunk=60)
    truth = stored_truth(source, rounds_activations=format in ("int8", "fp8"))
    for sequence, prompt in prompts.items():
        with torch.inference_mode():
            expected = truth(torch.tensor([prompt])).logits[0]
        wrong_Q = (found[sequence].cpu() - expected).norm(dim=1) / expected.norm(dim=1)
        assert wrong_Q.median() < MOST[format]
        assert wrong_Q.max() < 0.2
