"""The feed-forward half of a layer: one gated MLP, or experts behind a router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sailfish.checkpoint.model_config import ModelConfig
from sailfish.kernels.contract import Ops, SumNorm
from sailfish.models.layers.linear import Linear, LinearWeight, dense
from sailfish.models.layers.norm import add_and_norm


@dataclass(frozen=True, slots=True)
class Mlp:
    """down(activation(gate(x)) * up(x)) of the norm of a sum."""

    gate_up: Linear
    down: Linear
    activation: str

    def __call__(self, x_TD: Tensor, norm: SumNorm, ops: Ops) -> tuple[Tensor, Tensor]:
        """Return what the norm of x + residual becomes, and x + residual."""
        mlp_TM, sum_TD = self.gate_up.after_norm(x_TD, norm, ops, self.activation, self.down.takes)
        return self.down(mlp_TM, ops), sum_TD


@dataclass(frozen=True, slots=True)
class Experts:
    """A router and the gated MLPs it picks from."""

    router: Linear
    gate_up_X2MD: Tensor
    down_XDM: Tensor
    n_active: int
    normalise: bool
    activation: str

    def __call__(self, x_TD: Tensor, norm: SumNorm, ops: Ops) -> tuple[Tensor, Tensor]:
        """Return what the norm of x + residual becomes, and x + residual."""
        normed_TD, sum_TD = add_and_norm(x_TD, norm, ops)
        mlp_TD = ops.moe(
            normed_TD,
            self.router(normed_TD, ops),
            self.gate_up_X2MD,
            self.down_XDM,
            self.n_active,
            self.normalise,
            self.activation,
        )
        return mlp_TD, sum_TD


def feed_forward(config: ModelConfig, layer: int, weights: Mapping[str, LinearWeight]) -> Mlp | Experts:
    """Build what layer `layer` has, from the model's named weights."""
    name, moe = f"layers.{layer}", config.layers[layer].moe
    if moe is None:
        gate_up, down = (
            Linear.named(f"{name}.{part}", weights, has_bias=config.mlp_bias) for part in ("gate_up", "down")
        )
        return Mlp(gate_up, down, config.activation)
    return Experts(
        Linear.named(f"{name}.router", weights),
        dense(weights, f"{name}.experts.gate_up.weight"),
        dense(weights, f"{name}.experts.down.weight"),
        moe.n_active,
        moe.normalise_topk,
        config.activation,
    )
