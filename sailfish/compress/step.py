"""Compresses the linears of one block as a recipe says: folds, prunes, rounds, and tells what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from sailfish.base.errors import BuildError
from sailfish.checkpoint.formats.linear import QuantisedLinear
from sailfish.checkpoint.formats.tensors import FloatType
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.compress.awq import output_error
from sailfish.compress.block import Site
from sailfish.compress.folding import clip_block, fold_block
from sailfish.compress.gptq import quantise_gptq
from sailfish.compress.inputs import Inputs
from sailfish.compress.joint import Int4Groups, Int8Rows
from sailfish.compress.prune import (
    Blocks,
    Pruned,
    Share,
    Sparsity,
    magnitude_mask,
    refit,
    sparsegpt,
    wanda_mask,
)
from sailfish.compress.recipe import Prune, Recipe, Round
from sailfish.compress.report import Fallback, LinearFacts
from sailfish.compress.rtn import OCTAVE, quantise_8, quantise_int, restore_8, restore_int

_SCALES: dict[torch.dtype, FloatType] = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
}
_HALF_LAYOUTS = ("gptq", "gptq_v2", "awq")
"""Their kernels take scales in float16."""


@dataclass(slots=True, kw_only=True)
class CompressedBlock:
    """What became of a block."""

    linears: dict[str, QuantisedLinear] = field(default_factory=dict)
    """By module; those that are rounded."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Every tensor of the block by the checkpoint's names; rounded weights restored, in float32."""
    changed: set[str] = field(default_factory=set)
    """Names of dense tensors that are not the parent's."""
    facts: list[LinearFacts] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)

    def give_input_scale(self, site: Site, scale_1: Tensor, *, is_seen: bool) -> None:
        """Have the site's rounded linears scale all their inputs alike: float32, exact in bfloat16."""
        for module in self.linears.keys() & set(site.modules):
            self.linears[module] = replace(self.linears[module], input_scale=scale_1.numpy())
        if not is_seen:
            why = "nothing, or zeros alone, reached it: the static scale of its inputs is 1"
            self.fallbacks.append(Fallback(what="calibration", where=", ".join(site.modules), why=why))


def compress_block(
    config: ModelConfig,
    sites: Sequence[Site],
    tensors: Mapping[str, Tensor],
    norms: Mapping[str, str],
    inputs: dict[str, Inputs],
    recipe: Recipe,
    device: str,
) -> CompressedBlock:
    """Compress a block whose tensors go by the checkpoint's names; `norms` maps "attn_norm" and "mlp_norm".

    `inputs` holds what each site's linears read, by site; it is changed. BuildError names the linear that
    cannot be compressed.
    """
    made = CompressedBlock()
    weights = {m: tensors[f"{m}.weight"].to(device).float() for site in sites for m in site.modules}
    dtype = torch.float16 if recipe.layout in _HALF_LAYOUTS else torch.bfloat16
    alphas: dict[str, float | None] = {}
    others = {ours: tensors[theirs].to(device) for ours, theirs in norms.items()}
    others |= {n: t.to(device) for n, t in tensors.items() if n.endswith(".bias")}
    if recipe.fold is not None and recipe.round is not None:
        originals = dict(others)
        parts = config, sites, weights, others, inputs, recipe.fold, recipe.round, dtype
        alphas = {folded.site: folded.alpha for folded in fold_block(*parts)}
        made.changed |= {norms.get(n, n) for n, t in others.items() if t is not originals[n]}
    whole = dict(weights)
    if (
        recipe.fold is not None
        and recipe.round is not None
        and recipe.fold.method == "awq"
        and recipe.fold.clip
    ):
        clip_block(sites, weights, inputs, recipe.round, dtype)
    made.tensors = {**tensors, **{norms.get(n, n): t.cpu() for n, t in others.items()}}
    for site in sites:
        step = _Site(site, inputs[site.name], recipe, dtype, made, alphas.get(site.name))
        try:
            step.run(weights, whole, {m: tensors[f"{m}.weight"].dtype for m in site.modules})
        except BuildError as error:
            raise BuildError(f"{site.modules[0]}: {error.message}", hint=error.hint) from None
    return made


class _Site:
    """The linears of one site on their way."""

    def __init__(
        self,
        site: Site,
        seen: Inputs,
        recipe: Recipe,
        dtype: torch.dtype,
        made: CompressedBlock,
        alpha: float | None,
    ) -> None:
        self._site = site
        self._seen = seen
        self._recipe = recipe
        self._dtype = dtype
        self._made = made
        self._alpha = alpha
        self._is_seen = seen.n_tokens > 0

    def run(
        self, weights: Mapping[str, Tensor], whole: Mapping[str, Tensor], stored: Mapping[str, torch.dtype]
    ) -> None:
        """Compress each linear; those that are rounded alike at once, for their rows do not meet.

        `whole` are the weights as they were before their ranges were cut, from which errors count.
        """
        if not self._is_seen and self._recipe.needs_inputs:
            self._fall_back("calibration", "no token reached it: nothing is learned, weights count alike")
        by_round: dict[Round | None, list[str]] = {}
        for module in self._site.modules:
            by_round.setdefault(self._recipe.round_of(module), []).append(module)
        for rounding, modules in by_round.items():
            before = torch.cat([weights[module] for module in modules])
            sizes = [len(weights[module]) for module in modules]
            after, linear, how = self._compressed(before, sizes, rounding)
            if linear is None:
                after = torch.cat(
                    [
                        part.to(stored[m]).float()
                        for m, part in zip(modules, torch.split(after, sizes), strict=True)
                    ]
                )
            start = 0
            for module, size in zip(modules, sizes, strict=True):
                rows = slice(start, start + size)
                start += size
                self._keep(module, whole[module], after[rows], linear, rows, how, stored[module])

    def _compressed(
        self, weight_OI: Tensor, sizes: list[int], rounding: Round | None
    ) -> tuple[Tensor, QuantisedLinear | None, str]:
        """Return the restored weight, its codes if it is rounded, and how it was done."""
        prune, how = self._recipe.prune, "kept"
        if prune is not None:
            parts = [self._pruned(part, prune, rounding) for part in torch.split(weight_OI, sizes)]
            weight_OI = torch.cat([part[0] for part in parts])
            how = _prune_words(prune, prune.method if self._is_seen else "magnitude")
            if parts[0][1] is not None:
                assert rounding is not None
                linears = [part[1] for part in parts if part[1] is not None]
                return weight_OI, _joined(linears), f"{how} and {rounding.to}, SparseGPT"
        if rounding is None:
            return weight_OI, None, how
        words = f"{rounding.to} {'GPTQ' if rounding.method == 'gptq' and self._is_seen else 'RTN'}"
        restored, linear = self._rounded(weight_OI, rounding)
        return restored, linear, words if prune is None else f"{how}, {words}"

    def _pruned(
        self, weight_OI: Tensor, prune: Prune, rounding: Round | None
    ) -> tuple[Tensor, QuantisedLinear | None]:
        sparsity: Sparsity
        if prune.zeros is not None:
            sparsity = Share(prune.zeros)
        else:
            assert prune.keep is not None and prune.of is not None
            sparsity = Blocks(prune.keep, prune.of)
        if prune.method == "magnitude" or not self._is_seen:
            return weight_OI * magnitude_mask(weight_OI, sparsity), None
        hessian_II = self._seen.hessian_II
        if prune.method == "wanda":
            keep_OI = wanda_mask(weight_OI, hessian_II.diagonal(), sparsity)
            pruned = Pruned(weight_OI=weight_OI * keep_OI, keep_OI=keep_OI, damp_frac=prune.damp)
            return refit(weight_OI, pruned, hessian_II) if prune.refit else pruned.weight_OI, None
        joint = _joint(rounding, self._dtype)
        pruned = sparsegpt(
            weight_OI, hessian_II, sparsity, damp_frac=prune.damp, block=prune.block, rounding=joint
        )
        if pruned.damp_frac > prune.damp:
            self._fall_back("damping", f"the Hessian was singular: {pruned.damp_frac:g} of damping")
        if isinstance(joint, Int4Groups):
            codes = joint.codes(pruned.weight_OI)
            return pruned.weight_OI.float(), _quantised(*codes, joint.group, 4)
        if isinstance(joint, Int8Rows):
            values_OI, scale_O = joint.codes(pruned.weight_OI)
            code_OI = values_OI.view(torch.uint8) ^ 128
            return pruned.weight_OI.float(), _quantised(code_OI, scale_O[:, None], None, None, 8)
        return refit(weight_OI, pruned, hessian_II) if prune.refit else pruned.weight_OI, None

    def _rounded(self, weight_OI: Tensor, rounding: Round) -> tuple[Tensor, QuantisedLinear]:
        if rounding.to == "fp8":
            multiples = OCTAVE if rounding.search else (1.0,)
            values_OI, scale_O = quantise_8(weight_OI, "fp8", multiples=multiples, dtype=self._dtype)
            linear = _quantised(values_OI.view(torch.uint8), scale_O[:, None], None, None, 8, is_float=True)
            return restore_8(values_OI, scale_O), linear
        group, bits = rounding.group, rounding.bits
        if rounding.method == "rtn" or not self._is_seen:
            codes = quantise_int(
                weight_OI, group, rounding.symmetric, bits=bits, search=rounding.search, dtype=self._dtype
            )
        else:
            code_OI, scale_OG, zero_OG, facts = quantise_gptq(
                weight_OI,
                self._seen.hessian_II,
                group,
                symmetric=rounding.symmetric,
                act_order="static groups" if rounding.act_order else "none",
                damp=rounding.damp,
                search=rounding.search,
                refit=rounding.refit,
                sweeps=rounding.sweeps,
                bits=bits,
                dtype=self._dtype,
            )
            if facts.damp > facts.asked_damp:
                self._fall_back("damping", f"the Hessian was singular: {facts.damp:g} of damping")
            codes = code_OI, scale_OG, zero_OG
        return restore_int(*codes, group, bits=bits), _quantised(*codes, group, bits)

    def _keep(
        self,
        module: str,
        before_OI: Tensor,
        after_OI: Tensor,
        linear: QuantisedLinear | None,
        rows: slice,
        how: str,
        stored: torch.dtype,
    ) -> None:
        if not bool(after_OI.isfinite().all()):
            raise BuildError("compressed weights are not finite", hint="calibrate with another text")
        name = f"{module}.weight"
        old, new = self._made.tensors[name], after_OI.cpu()
        if linear is not None:
            self._made.linears[module] = _rows(linear, rows)
        else:
            new = new.to(stored)
            if not torch.equal(new, old):
                self._made.changed.add(name)
        self._made.tensors[name] = new
        wrong = float((after_OI - before_OI).square().sum(dtype=torch.float64))
        size = float(before_OI.square().sum(dtype=torch.float64))
        error = output_error(before_OI, after_OI, self._seen.hessian_II) if self._is_seen else None
        self._made.facts.append(
            LinearFacts(
                module=module,
                n_out=len(before_OI),
                n_in=before_OI.shape[1],
                how=how,
                output_error=None if error is None else max(0.0, error) ** 0.5,
                weight_error=(wrong / size) ** 0.5 if size else 0.0,
                zeros_frac=float((after_OI == 0).float().mean()),
                alpha=self._alpha,
            )
        )

    def _fall_back(self, what: str, why: str) -> None:
        self._made.fallbacks.append(Fallback(what=what, where=", ".join(self._site.modules), why=why))


def _joint(rounding: Round | None, dtype: torch.dtype) -> Int4Groups | Int8Rows | None:
    """Return what rounds in SparseGPT's one pass, None where rounding comes after it."""
    if rounding is not None and rounding.to == "int4":
        return Int4Groups(rounding.group, rounding.symmetric, dtype=dtype)
    return Int8Rows() if rounding is not None and rounding.to == "int8" and rounding.group is None else None


def _prune_words(prune: Prune, method: str) -> str:
    what = f"{prune.keep}:{prune.of}" if prune.zeros is None else f"{prune.zeros:.0%} zeros"
    names = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}
    return f"{what} {names[method]}{', refitted' if prune.refit and method != 'magnitude' else ''}"


def _quantised(
    code_OI: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor | None,
    group: int | None,
    bits: int,
    *,
    is_float: bool = False,
) -> QuantisedLinear:
    n_in = code_OI.shape[1]
    return QuantisedLinear(
        code_OI=code_OI.contiguous().cpu().numpy(),
        scale_OG=scale_OG.float().contiguous().cpu().numpy(),
        zero_OG=None if zero_OG is None else zero_OG.to(torch.uint8).contiguous().cpu().numpy(),
        g_idx=None,
        group=n_in if group is None else min(group, n_in),
        bits=bits,
        scale_dtype=_SCALES[scale_OG.dtype],
        is_float=is_float,
    )


def _rows(linear: QuantisedLinear, rows: slice) -> QuantisedLinear:
    """Return some outputs of a layer."""
    return QuantisedLinear(
        code_OI=linear.code_OI[rows].copy(),
        scale_OG=linear.scale_OG[rows].copy(),
        zero_OG=None if linear.zero_OG is None else linear.zero_OG[rows].copy(),
        g_idx=linear.g_idx,
        group=linear.group,
        bits=linear.bits,
        scale_dtype=linear.scale_dtype,
        is_float=linear.is_float,
    )


def _joined(linears: Sequence[QuantisedLinear]) -> QuantisedLinear:
    """Return layers of the same inputs as one, the outputs one after the other."""
    first = linears[0]
    zeros = [linear.zero_OG for linear in linears if linear.zero_OG is not None]
    return QuantisedLinear(
        code_OI=np.concatenate([linear.code_OI for linear in linears]),
        scale_OG=np.concatenate([linear.scale_OG for linear in linears]),
        zero_OG=np.concatenate(zeros) if zeros else None,
        g_idx=None,
        group=first.group,
        bits=first.bits,
        scale_dtype=first.scale_dtype,
        is_float=first.is_float,
    )
