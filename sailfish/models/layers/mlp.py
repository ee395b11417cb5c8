"""The feed-forward half of a layer: one gated MLP, or experts behind a router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sailfish.checkpoint.model_config import ModelConfig
from sailfish.kernels.contract import ActivationFormat, Ops, Quantised
from sailfish.models.layers.linear import Linear, LinearWeight, dense


@dataclass(frozen=True, slots=True)
class Mlp:
    """down(activation(gate(x)) * up(x))."""

    gate_up: Linear
    down: Linear
    activation: str

    @property
    def takes(self) -> ActivationFormat:
        """The format of activations it takes."""
        return self.gate_up.takes

    def __call__(self, x_TD: Tensor | Quantised, ops: Ops) -> Tensor:
        return self.down(ops.act_mul(self.gate_up(x_TD, ops), self.activation, self.down.takes), ops)


@dataclass(frozen=True, slots=True)
class Experts:
    """A router and the gated MLPs it picks from."""

    router: Linear
    gate_up_X2MD: Tensor
    down_XDM: Tensor
    n_active: int
    normalise: bool
    activation: str

    @property
    def takes(self) -> ActivationFormat:
        """The format of activations it takes."""
        return "plain"

    def __call__(self, x_TD: Tensor | Quantised, ops: Ops) -> Tensor:
        assert not isinstance(x_TD, Quantised), "experts take plain activations"
        router_TX = self.router(x_TD, ops)
        return ops.moe(
            x_TD,
            router_TX,
            self.gate_up_X2MD,
            self.down_XDM,
            self.n_active,
            self.normalise,
            self.activation,
        )


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
