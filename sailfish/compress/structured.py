"""Chooses the heads, MLP channels and layers that a model can best do without, and takes them out.

What is left is a smaller dense model. The linears that read what is gone, the output and the down
projection, are fitted again to their old outputs where asked to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.base.errors import BuildError
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.compress.awq import output_error
from sailfish.compress.block import block_specs
from sailfish.compress.inputs import Inputs
from sailfish.compress.prune import inverse_factor
from sailfish.compress.recipe import Cut
from sailfish.compress.report import Fallback, Removed


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What is left of a linear some of whose inputs are gone."""

    group_U: Tensor
    """int64 on the host, the U groups that stay, ascending."""
    index_J: Tensor
    """int64, the J inputs that stay, ascending."""
    weight_OJ: Tensor
    """float32, of these inputs."""
    lost: float
    """||X (W - W')|| / ||X W|| where the others are not fitted again."""
    repaired: float | None
    """The same where they are; None: they were not."""
    damp_frac: float
    """More than was asked for where the Hessian could not be inverted with less."""


@dataclass(slots=True, kw_only=True)
class CutBlock:
    """What is left of a block."""

    tensors: dict[str, Tensor]
    """All of them, by the checkpoint's names, in their dtypes."""
    changed: set[str] = field(default_factory=set)
    """Names of those that are not the parent's."""
    removed: list[Removed] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)


def group_energy(weight_OI: Tensor, hessian_II: Tensor, n_groups: int) -> Tensor:
    """Return energy_G, the mean of ||W_g x_g||^2 that each group of following inputs adds to the outputs.

    Of one input this is the square of Wanda's |w| ||x|| over a column (Sun et al. 2023, section 3), of a
    head the energy of all that is read of it. hessian_II is the mean of x x^T.
    """
    width = len(hessian_II) // n_groups
    w_GOJ = weight_OI.to(hessian_II.dtype).view(-1, n_groups, width).transpose(0, 1)
    groups = torch.arange(n_groups, device=hessian_II.device)
    h_GJJ = hessian_II.view(n_groups, width, n_groups, width)[groups, :, groups]
    return (w_GOJ @ h_GJJ * w_GOJ).sum((1, 2))


def leave(
    weight_OI: Tensor, hessian_II: Tensor, n_groups: int, n_left: int, *, damp_frac: float | None
) -> Left:
    """Keep the groups of inputs of highest energy, and fit their weights to what the outputs were.

    The fit minimises ||X W - X_J W_J'||^2 with damping of `damp_frac` times the Hessian's mean diagonal
    times ||W_J' - W_J||^2 (the update of Hassibi & Stork 1993 for many weights at once); None: no fit.
    Computed in the dtype of hessian_II, the mean of x x^T. BuildError if something is not finite.
    """
    energy_G = group_energy(weight_OI, hessian_II, n_groups)
    if not bool(energy_G.isfinite().all()):
        raise BuildError("some weights or activations to choose by are not finite")
    group_U = energy_G.sort(stable=True, descending=True).indices[:n_left].sort().values
    is_left_I = torch.zeros_like(energy_G, dtype=torch.bool).index_fill(0, group_U, True)
    is_left_I = is_left_I.repeat_interleave(len(hessian_II) // n_groups)
    index_J = is_left_I.nonzero()[:, 0]
    cut_OI = weight_OI * is_left_I
    lost = _error(weight_OI, cut_OI, hessian_II)
    repaired = None
    if damp_frac is not None:
        u_JJ, damp_frac = inverse_factor(hessian_II[index_J][:, index_J], damp_frac)
        gone_OI = weight_OI - cut_OI
        cut_OI[:, index_J] += gone_OI @ hessian_II[:, index_J] @ u_JJ.T @ u_JJ
        repaired = _error(weight_OI, cut_OI, hessian_II)
    return Left(
        group_U=group_U.cpu(),
        index_J=index_J,
        weight_OJ=cut_OI[:, index_J],
        lost=lost,
        repaired=repaired,
        damp_frac=damp_frac or 0.0,
    )


def cut_block(
    config: ModelConfig,
    narrow: ModelConfig,
    layer: int,
    tensors: Mapping[str, Tensor],
    inputs: Mapping[str, Inputs],
    cut: Cut,
    device: str,
) -> CutBlock:
    """Take out the heads and MLP channels that `narrow` has no place for, those of least energy.

    `tensors` go by the checkpoint's names; `inputs`, what each site's linears read, lose the same. BuildError
    names the linear that cannot be fitted.
    """
    made = CutBlock(tensors=dict(tensors))
    specs = {spec.name.removeprefix("layers.0."): spec.sources for spec in block_specs(config, layer)}
    if narrow.n_kv_heads < config.n_kv_heads:
        producers = (*specs["qkv.weight"], *specs.get("qkv.bias", ()))
        module = specs["o.weight"][0].removesuffix(".weight")
        left = _cut_site(made, module, inputs["o"], config.n_kv_heads, narrow.n_kv_heads, cut, device)
        for name in producers:
            rows = tensors[name]
            groups = rows.view(config.n_kv_heads, -1, *rows.shape[1:])
            made.tensors[name] = groups[left.group_U].flatten(0, 1)
        made.changed.update(producers)
    if narrow.d_mlp < config.d_mlp:
        producers = (*specs["gate_up.weight"], *specs.get("gate_up.bias", ()))
        module = specs["down.weight"][0].removesuffix(".weight")
        left = _cut_site(made, module, inputs["down"], config.d_mlp, narrow.d_mlp, cut, device)
        for name in producers:  # where gate and up are one tensor, up follows gate
            rows = tensors[name]
            halves = rows.view(-1, config.d_mlp, *rows.shape[1:])
            made.tensors[name] = halves[:, left.group_U].flatten(0, 1)
        made.changed.update(producers)
    return made


def block_influence(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return 1 less the mean cosine of states [T, D] before and after a block (Men et al. 2024, eq. 1)."""
    cosines = [F.cosine_similarity(x.float(), y.float(), dim=-1) for x, y in zip(before, after, strict=True)]
    return 1.0 - float(torch.cat(cosines).mean(dtype=torch.float64))


def least_influential(influence: Sequence[float], n_layers: int) -> list[int]:
    """Return the layers of least influence, ascending; never the last one, whose states the head reads."""
    return sorted(sorted(range(len(influence) - 1), key=influence.__getitem__)[:n_layers])


def _cut_site(
    made: CutBlock, module: str, seen: Inputs, n_groups: int, n_left: int, cut: Cut, device: str
) -> Left:
    """Take groups of inputs from a linear, and tell it."""
    name = f"{module}.weight"
    weight = made.tensors[name]
    try:
        left = leave(
            weight.to(device).float(),
            seen.hessian_II,
            n_groups,
            n_left,
            damp_frac=cut.damp if cut.repair else None,
        )
    except BuildError as error:
        raise BuildError(f"{module}: {error.message}", hint=error.hint) from None
    if left.damp_frac > cut.damp:
        why = f"the Hessian was singular: {left.damp_frac:g} of damping"
        made.fallbacks.append(Fallback(what="damping", where=module, why=why))
    seen.keep(left.index_J)
    made.tensors[name] = left.weight_OJ.to("cpu", weight.dtype)
    made.changed.add(name)
    what = f"{n_groups - n_left} of {n_groups} {'channels' if n_groups == weight.shape[1] else 'kv heads'}"
    made.removed.append(Removed(where=module, what=what, influence=left.lost, repaired=left.repaired))
    return left


def _error(weight_OI: Tensor, new_OI: Tensor, hessian_II: Tensor) -> float:
    return math.sqrt(max(0.0, output_error(weight_OI, new_OI, hessian_II)))
