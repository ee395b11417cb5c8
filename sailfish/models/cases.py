"""What a model asks of each op, so that implementations can be chosen without the device. No torch."""

from __future__ import annotations

from sailfish.checkpoint.model_config import ModelConfig
from sailfish.kernels.contract import Case
from sailfish.kernels.table import OPS


def op_cases(config: ModelConfig, *, target: str, dtype: str, page_tokens: int) -> tuple[Case, ...]:
    """Return one case for each op."""
    moe = next((layer.moe for layer in config.layers if layer.moe is not None), None)
    windows = {layer.window_tokens for layer in config.layers if layer.window_tokens is not None}
    return tuple(
        Case(
            op=op,
            target=target,
            dtype=dtype,
            head_dim=config.head_dim,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            page_tokens=page_tokens,
            windows=tuple(sorted(windows)),
            softcap=config.attention_softcap,
            d_model=config.d_model,
            d_mlp=config.d_mlp if moe is None else moe.d_mlp,
            n_experts=0 if moe is None else moe.n_experts,
            n_active=0 if moe is None else moe.n_active,
        )
        for op in OPS
    )
