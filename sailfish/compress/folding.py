"""Folds factors of channels into a block: finds each site's, and who makes its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sailfish.checkpoint.model_config import ModelConfig
from sailfish.compress.awq import clip, search_scale
from sailfish.compress.block import Site
from sailfish.compress.fold import divide_norm, divide_outputs, of_values, scale_inputs, share_over_queries
from sailfish.compress.inputs import Inputs
from sailfish.compress.recipe import Fold, Round
from sailfish.compress.rtn import quantise_8, quantise_int, restore_8, restore_int
from sailfish.compress.smoothquant import search_smooth, smooth_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """What folding found for one site."""

    site: str
    alpha: float | None
    """The exponent that was best; None: no factors were."""
    gain: float
    """The squared error of the outputs over that without factors."""


def fold_block(
    config: ModelConfig,
    sites: Sequence[Site],
    weights: dict[str, Tensor],
    others: dict[str, Tensor],
    inputs: dict[str, Inputs],
    fold: Fold,
    rounding: Round,
    dtype: torch.dtype,
) -> list[Folded]:
    """Scale the weights of each site's linears in place, and its producer against them.

    `weights` holds float32 weights by module, `others` the block's norms and biases by tensor name; the
    inputs become those that the scaled weights read. `dtype` is that of stored scales. The outputs of the
    block stay what they were but for the rounding of norms and biases to their dtype.
    """
    found = []
    by_name = {site.name: site for site in sites}
    for site in reversed(sites):  # a producer that is a linear is divided before its own inputs are searched
        seen = inputs[site.name]
        if not seen.n_tokens:
            continue
        producer = _producer(config, site, by_name, weights, others)
        if producer is None:
            continue
        its = [weights[module] for module in site.modules]
        scale_I, folded = _search(
            site.name, its, seen, fold, rounded(rounding, dtype), rounding.group, producer.tied
        )
        found.append(folded)
        if folded.alpha is None:
            continue
        producer.divide(scale_I)
        for module in site.modules:
            weights[module] = scale_inputs(weights[module], scale_I)
        seen.divide(scale_I)
    return found[::-1]


def clip_block(
    sites: Sequence[Site],
    weights: dict[str, Tensor],
    inputs: dict[str, Inputs],
    rounding: Round,
    dtype: torch.dtype,
) -> None:
    """Cut the range of each group where its outputs gain, in place.

    Queries and keys are left alone: their products have errors of their own (the paper's code).
    """
    for site in sites:
        if not inputs[site.name].n_tokens:
            continue
        hessian_II = inputs[site.name].hessian_II
        for module in site.modules[2:] if site.name == "qkv" else site.modules:
            weights[module] = clip(weights[module], hessian_II, rounding.group, rounded(rounding, dtype))


def rounded(rounding: Round, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return what rounding to the nearest, whole ranges, leaves of float32 weights."""

    def restored(weight_OI: Tensor) -> Tensor:
        if rounding.to == "fp8":
            return restore_8(*quantise_8(weight_OI, "fp8", dtype=dtype))
        codes = quantise_int(
            weight_OI, rounding.group, rounding.symmetric, bits=rounding.bits, search=False, dtype=dtype
        )
        return restore_int(*codes, rounding.group, bits=rounding.bits)

    return restored


def _search(
    name: str,
    weights: list[Tensor],
    seen: Inputs,
    fold: Fold,
    keep: Callable[[Tensor], Tensor],
    group: int | None,
    tied: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Folded]:
    if fold.method == "awq":
        best = search_scale(
            weights,
            seen.hessian_II,
            seen.magnitude_I,
            keep,
            group=group if fold.duo else None,
            n_grid=fold.grid,
            tied=tied,
        )
        is_none = bool((best.scale_I == 1).all())
        gain = best.error / best.error_before if best.error_before else 1.0
        return best.scale_I, Folded(site=name, alpha=None if is_none else best.alpha, gain=gain)
    if fold.alpha != "search":
        scale_I = tied(smooth_scale(seen.largest_I, weights, fold.alpha))
        return scale_I, Folded(site=name, alpha=fold.alpha, gain=1.0)
    smoothed = search_smooth(seen.sample_TI, weights, largest_I=seen.largest_I, tied=tied)
    gain = smoothed.error / smoothed.error_before if smoothed.error_before else 1.0
    return smoothed.scale_I, Folded(site=name, alpha=smoothed.alpha, gain=gain)


@dataclass(frozen=True, slots=True)
class _Producer:
    """Who makes a site's inputs: how it can be divided, and by what."""

    tied: Callable[[Tensor], Tensor]
    divide: Callable[[Tensor], None]


def _producer(
    config: ModelConfig,
    site: Site,
    by_name: dict[str, Site],
    weights: dict[str, Tensor],
    others: dict[str, Tensor],
) -> _Producer | None:
    """Return the producer; None for the inputs of experts, which the router reads too."""
    name = site.name
    if name in ("qkv", "gate_up"):
        return _norm(config, "attn_norm" if name == "qkv" else "mlp_norm", others)
    if name == "o":
        heads = config.n_heads, config.n_kv_heads
        return _Producer(
            lambda scale_I: share_over_queries(scale_I, *heads),
            lambda scale_I: _divide(by_name["qkv"].modules[2], of_values(scale_I, *heads), weights, others),
        )
    if name.endswith("down"):
        up = by_name[name.removesuffix("down") + "gate_up"].modules[-1]
        return _Producer(lambda scale_I: scale_I, lambda scale_I: _divide(up, scale_I, weights, others))
    return None


def _norm(config: ModelConfig, norm: str, others: dict[str, Tensor]) -> _Producer:
    def divided(scale_I: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        return divide_norm(others[norm], None, scale_I, plus_one=config.norm_plus_one)

    def divide(scale_I: Tensor) -> None:
        others[norm] = divided(scale_I)[0]

    return _Producer(lambda scale_I: divided(scale_I)[2], divide)


def _divide(module: str, scale_O: Tensor, weights: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Divide the last outputs of a linear, which are all but where gate and up are one."""
    weight_OI, bias_O = weights[module], others.get(f"{module}.bias")
    n_kept = len(weight_OI) - len(scale_O)
    whole_O = torch.cat([scale_O.new_ones(n_kept), scale_O])
    weights[module], divided_O = divide_outputs(weight_OI, bias_O, whole_O)
    if bias_O is not None and divided_O is not None:
        others[f"{module}.bias"] = divided_O.to(bias_O.dtype)
