"""Quantised engines on a GPU: made there, loaded there, and multiplied by the chosen kernels."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from paged import BytesPiece, PagedDriver
from rounded import rounded_truth

from sailfish.artifact.reader import Artifact
from sailfish.base.config import EngineConfig
from sailfish.build.builder import build_engine
from sailfish.compress.job import Job
from sailfish.compress.worker import quantise
from sailfish.data import demo_model
from sailfish.models import load
from sailfish.models.arena import arena_layout
from sailfish.models.load import DTYPES, load_weights
from sailfish.plan.formats import ArenaTensor
from sailfish.plan.types import Dtype, WeightFormat, WeightFormats

pytestmark = pytest.mark.gpu
MEDIAN = {"int4": 0.02, "int8": 0.04, "fp8": 0.1}
"""Relative errors of logits: bfloat16 activations round to the other 8-bit number often enough."""


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_a_gpu_quantises_to_what_the_cpu_does(format: WeightFormat, tmp_path: Path) -> None:
    done = {}
    for place in ("cpu", "cuda"):
        (tmp_path / place).mkdir()
        job = Job(
            checkpoint=str(demo_model()),
            out=str(tmp_path / place),
            formats=WeightFormats(layers=format, head=format),
            dtype="bfloat16",
            may_use_gpu=place == "cuda",
        )
        done[place] = quantise(job, lambda *_: None)
        assert done[place].device == place
    assert done["cuda"].error == pytest.approx(done["cpu"].error, rel=1e-4)
    if format != "int4":  # whose search compares sums, which depend on their order
        assert done["cuda"].weights == done["cpu"].weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("staging_bytes", [64, 1 << 12, 1 << 20])
def test_weights_of_any_source_dtype_reach_the_gpu_exactly(
    dtype: Dtype, staging_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_STAGING_BYTES", staging_bytes)
    draw = random.Random(staging_bytes)
    tensors, pieces = [], {}
    for i in range(40):
        own = draw.choice([None, None, "I32", "I8", "F8_E4M3", "BF16", "F32"])
        parts = []
        for _ in range(draw.randint(1, 3)):
            source = own or draw.choice(["F32", "F16", "BF16"])
            part = torch.randint(0, 100, (draw.randint(1, 90), 37)).to(DTYPES[source])
            parts.append(BytesPiece(part.view(torch.uint8).numpy().tobytes(), source))
        n_rows = sum(piece.n_bytes // DTYPES[piece.dtype].itemsize for piece in parts) // 37
        tensors.append(ArenaTensor(name=f"w{i}", shape=(n_rows, 37), dtype=own, run=0 if n_rows % 16 else 8))
        pieces[f"w{i}"] = parts
    _, n_bytes = arena_layout(tensors, dtype)
    arenas = [torch.zeros(n_bytes, dtype=torch.uint8, device=device) for device in ("cpu", "cuda")]
    for arena in arenas:
        load_weights(tensors, pieces, arena, dtype)
    assert torch.equal(arenas[0], arenas[1].cpu())


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(weights="int4", head="int4", embedding="int8"),
        EngineConfig(weights="int4", weight_group=32, head="int8"),
        EngineConfig(weights="int8", head="int8"),
        EngineConfig(weights="fp8", head="fp8"),
    ],
    ids=str,
)
def test_the_chosen_kernels_give_the_logits_of_transformers_with_the_same_rounded_weights(
    config: EngineConfig, tmp_path: Path
) -> None:
    engine: Artifact = build_engine(demo_model(), tmp_path / "engine", config=config)
    assert engine.manifest.plan.dtype == "bfloat16"
    assert config.weights is not None
    prompts = {i: [(997 * i + 31 * j) % 8000 for j in range(1 + 40 * i)] for i in range(4)}
    driver = PagedDriver(demo_model(), seed=1, device="cuda", dtype="bfloat16", engine=engine)
    found = driver.prefill(prompts, largest_chunk=60)
    truth = rounded_truth(demo_model(), engine)
    for sequence, prompt in prompts.items():
        with torch.inference_mode():
            expected = truth(torch.tensor([prompt])).logits[0]
        wrong_Q = (found[sequence].cpu() - expected).norm(dim=1) / expected.norm(dim=1)
        assert wrong_Q.median() < MEDIAN[config.weights]
        assert wrong_Q.max() < 0.2
