"""Rotary frequencies are transformers', to the last bits that float32 gives."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sailfish.checkpoint.model_config import RopeConfig
from sailfish.models.layers.rope import frequencies, rope_table

_LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = [
    ("linear", {"factor": 4.0}, 1.0),
    ("llama3", {**_LLAMA31, "original_max_position_embeddings": 8192}, 1.0),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": 32768}, 1.1386294361119891),
]


@pytest.mark.parametrize(("kind", "parameters", "attention_factor"), CASES)
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_scaled_frequencies_equal_those_of_transformers(
    kind: str, parameters: dict[str, float], attention_factor: float, theta: float
) -> None:
    config = LlamaConfig(
        hidden_size=1024,
        num_attention_heads=8,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **parameters},
    )
    theirs, their_factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    ours = RopeConfig(
        theta=theta,
        rotary_dim=128,
        scaling=kind,  # type: ignore[arg-type]
        factor=parameters["factor"],
        original_context_tokens=int(parameters.get("original_max_position_embeddings", 0)),
        attention_factor=attention_factor,
    )
    assert their_factor == pytest.approx(attention_factor)
    torch.testing.assert_close(frequencies(ours), theirs, rtol=1e-6, atol=0)


def test_the_table_holds_the_cosine_and_sine_of_far_positions() -> None:
    table_C2F = rope_table(RopeConfig(theta=1e4, rotary_dim=8), 100_000, torch.device("cpu"))
    assert table_C2F.shape == (100_000, 2, 4)
    torch.testing.assert_close(table_C2F[0], torch.tensor([[1.0] * 4, [0.0] * 4]))
    angle = torch.tensor(99_999.0)
    torch.testing.assert_close(table_C2F[99_999, :, 0], torch.stack((angle.cos(), angle.sin())))
