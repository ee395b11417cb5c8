"""Compresses a checkpoint block by block: one block's weights and the states of the windows are in memory.

Calibration reads each block's inputs as the blocks before it, already compressed, make them. The measured
windows go through the parent and through what became of it side by side, so that quality needs no second
reading and no second copy of the model.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sailfish.base.errors import BuildError, CheckpointError
from sailfish.checkpoint.formats.codec import quantised_modules
from sailfish.checkpoint.formats.tensors import StoredTensor
from sailfish.checkpoint.formats.writer import CheckpointWriter
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.checkpoint.names import check_tensors
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.compress.block import (
    Block,
    Device,
    RoundedInputs,
    block_specs,
    block_tensors,
    embedded,
    outer_tensors,
    sites,
)
from sailfish.compress.cut import n_layers_left, narrowed
from sailfish.compress.inputs import Inputs
from sailfish.compress.parent import ParentStates
from sailfish.compress.recipe import Recipe
from sailfish.compress.report import Fallback, LinearFacts, Removed
from sailfish.compress.rtn import Format8
from sailfish.compress.static_scale import Magnitudes, static_scale
from sailfish.compress.step import CompressedBlock, compress_block
from sailfish.compress.storing import Store
from sailfish.compress.structured import block_influence, cut_block, least_influential
from sailfish.compress.texts import Texts
from sailfish.hardware.memory import begin_cuda_peak, cuda_memory
from sailfish.quality.evaluate import chunks_of, on_host
from sailfish.quality.metrics import compare_tokens
from sailfish.quality.scores import Comparison

Tell = Callable[[str, int, int], None]
"""Told (what is done, blocks done, blocks in all)."""
_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(slots=True, kw_only=True)
class Run:
    """What one pass over the blocks found."""

    comparison: Comparison = field(init=False)
    """Over all windows, once every block is done."""
    drift: list[float] = field(default_factory=list)
    linears: list[LinearFacts] = field(default_factory=list)
    removed: list[Removed] = field(default_factory=list)
    influence: list[float] = field(default_factory=list)
    """Of each block, where some are removed for having little."""
    fallbacks: list[Fallback] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    peak_bytes: int = 0


def compress(
    source: Path,
    out: CheckpointWriter | None,
    recipe: Recipe,
    texts: Texts,
    on: Device,
    parent: ParentStates,
    tell: Tell,
    finish: Callable[[Run], dict[str, bytes]],
) -> Run:
    """Compress the dense checkpoint in `source`; without `out` nothing is written, and all is measured.

    `parent` is filled, or used where it was filled with the same windows. `finish` is called when all is
    measured and before the checkpoint gets its name: it returns the files to put beside the weights, or
    raises to have nothing written. Raises CheckpointError for a checkpoint that cannot be compressed,
    BuildError where a linear cannot.
    """
    checkpoint, config = _opened(source)
    store = Store(source, checkpoint, recipe, out)
    driver = _Driver(checkpoint, config, recipe, texts, on, parent, store)
    if on.torch == "cuda":
        begin_cuda_peak()
    run = driver.run(tell)
    store.copy_rest()
    run.bytes_before = sum(ref.n_bytes for ref in checkpoint.tensors.values())
    run.bytes_after = store.n_bytes
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run.peak_bytes = cuda_memory().peak_allocated_bytes if on.torch == "cuda" else peak_kib * 1024
    with _timed(run.seconds, "report and writing"):
        store.finish(finish(run))
    return run


def _opened(source: Path) -> tuple[Checkpoint, ModelConfig]:
    checkpoint = Checkpoint.open(source)
    if quantised_modules(checkpoint.tensors):
        raise CheckpointError(
            f"{source} is quantised already", hint="compress the dense model it was made of"
        )
    config = load_model_config(source)
    check_tensors(config, checkpoint)
    return checkpoint, config


class _Driver:
    """The states of all windows, and the blocks one after the other."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        recipe: Recipe,
        texts: Texts,
        on: Device,
        parent: ParentStates,
        store: Store,
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._narrow = config if recipe.cut is None else narrowed(config, recipe.cut)
        """With the heads and channels that stay, of all layers."""
        self._recipe = recipe
        self._on = on
        self._store = store
        self._window_tokens = max(len(window.tokens) for window in (*texts.evaluation, *texts.calibration))
        table_VD, self._norm_D, self._head_VD = outer_tensors(checkpoint, config)
        self._windows = texts.evaluation
        calibration = texts.calibration if recipe.is_calibrated else []
        self._calibration = [embedded(config, window.tokens, table_VD, on) for window in calibration]
        self._child = [embedded(config, window.tokens, table_VD, on) for window in texts.evaluation]
        self._parent = parent
        parent.begin(texts.evaluation, config.n_layers, self._child)

    def run(self, tell: Tell) -> Run:
        """Compress every block, and compare what comes out of the last one."""
        n_layers = self._config.n_layers
        run = Run()
        gone = self._cut_layers(run, tell)
        parent = child = None
        for layer in range(n_layers):
            parent = child = None  # gives their memory back before the next ones take theirs
            is_last = layer == n_layers - 1
            tell("compressing", layer, n_layers)
            tensors = block_tensors(self._checkpoint, self._config, layer)
            parent = self._block(self._config, layer, tensors, is_last, {})
            inputs = {s.name: Inputs(s.n_in, self._on.torch) for s in sites(self._config, layer)}
            if layer not in gone and self._recipe.needs_inputs:
                with _timed(run.seconds, "calibration"):
                    self._see(parent, inputs)
            with _timed(run.seconds, "measuring"):
                if len(self._parent.first) == layer:
                    self._parent.read(parent.run)
            if layer in gone:
                run.drift.append(_drift(self._child, self._parent.first[layer]))
                continue
            if not is_last:
                parent = None
            with _timed(run.seconds, "methods"):
                made = self._compressed(layer, tensors, inputs, run)
            with _timed(run.seconds, "calibration"):
                rounded = self._rounded(layer, made)
            self._keep(made, tensors, run)
            child = self._block(self._narrow, layer, made.tensors, is_last, rounded)
            with _timed(run.seconds, "calibration"):
                if not is_last:
                    self._calibration = [child.run(hidden_TD) for hidden_TD in self._calibration]
            with _timed(run.seconds, "measuring"):
                self._child = [child.run(hidden_TD) for hidden_TD in self._child]
                run.drift.append(_drift(self._child, self._parent.first[layer]))
        tell("compressing", n_layers, n_layers)
        assert parent is not None and child is not None, "a decoder has at least one layer"
        with _timed(run.seconds, "measuring"):
            run.comparison = self._compare(parent, child)
        return run

    def _cut_layers(self, run: Run, tell: Tell) -> list[int]:
        """Return the layers that the recipe removes, and have the store know what is left."""
        cut, n_layers = self._recipe.cut, self._config.n_layers
        if cut is None:
            return []
        gone: list[int] = []
        if cut.layers:
            with _timed(run.seconds, "calibration"):
                run.influence = self._influence(tell)
            gone = least_influential(run.influence, n_layers - n_layers_left(self._config, cut))
            run.removed += [
                Removed(
                    where=f"model.layers.{layer}", what="layer", influence=run.influence[layer], repaired=None
                )
                for layer in gone
            ]
        kept = [layer for layer in range(n_layers) if layer not in gone]
        self._store.shrink(replace(self._narrow, layers=tuple(self._narrow.layers[i] for i in kept)), kept)
        if not self._recipe.needs_inputs and self._recipe.activations != "static":
            self._calibration = []
        return gone

    def _influence(self, tell: Tell) -> list[float]:
        """Return each block's influence on the calibration windows, in the parent."""
        found, states = [], self._calibration
        for layer in range(self._config.n_layers):
            tell("measuring influence", layer, self._config.n_layers)
            block = None  # gives its memory back before the next one takes its own
            tensors = block_tensors(self._checkpoint, self._config, layer)
            block = self._block(self._config, layer, tensors, False, {})
            after = [block.run(hidden_TD) for hidden_TD in states]
            found.append(block_influence(states, after))
            states = after
        return found

    def _see(self, block: Block, inputs: dict[str, Inputs]) -> None:
        """Have a block with its parent's weights read the calibration windows, and gather its inputs."""
        for hidden_TD in self._calibration:
            block.run(hidden_TD, lambda name, x_TI: inputs[name].add(x_TI))

    def _block(
        self,
        config: ModelConfig,
        layer: int,
        tensors: dict[str, Tensor],
        is_last: bool,
        rounded: dict[str, RoundedInputs],
    ) -> Block:
        head = (self._norm_D, self._head_VD) if is_last else None
        return Block(config, layer, tensors, self._on, self._window_tokens, head=head, rounded=rounded)

    def _compressed(
        self, layer: int, tensors: dict[str, Tensor], inputs: dict[str, Inputs], run: Run
    ) -> CompressedBlock:
        norms = {
            spec.name.split(".")[2]: spec.sources[0]
            for spec in block_specs(self._config, layer)
            if spec.name.endswith(("attn_norm.weight", "mlp_norm.weight"))
        }
        recipe, on, changed = self._recipe, self._on.torch, set[str]()
        if recipe.cut is not None:
            cut = cut_block(self._config, self._narrow, layer, tensors, inputs, recipe.cut, on)
            run.removed += cut.removed
            run.fallbacks += cut.fallbacks
            tensors, changed = cut.tensors, cut.changed
        where = sites(self._narrow, layer)
        made = compress_block(self._narrow, where, tensors, norms, inputs, recipe, on)
        made.changed |= changed - {f"{module}.weight" for module in made.linears}
        return made

    def _rounded(self, layer: int, made: CompressedBlock) -> dict[str, RoundedInputs]:
        """Return how sites round their inputs when the model runs; their linears get static scales."""
        if self._recipe.activations == "none":
            return {}
        to: Format8 = "fp8" if self._recipe.layout == "float-quantized" else "int8"
        found = {
            site: RoundedInputs(to=to)
            for site in sites(self._narrow, layer)
            if any(module in made.linears for module in site.modules)
        }
        if self._recipe.activations == "static":
            seen = {site.name: Magnitudes() for site in found}
            block = self._block(self._narrow, layer, made.tensors, False, {})
            for hidden_TD in self._calibration:
                block.run(hidden_TD, lambda name, x_TI: seen[name].add(x_TI) if name in seen else None)
            for site in found:
                scale = static_scale(seen[site.name], self._recipe.static, to)
                scale_1 = torch.tensor([scale]).bfloat16().float()  # as it is stored
                made.give_input_scale(site, scale_1, is_seen=seen[site.name].largest > 0)
                found[site] = RoundedInputs(to=to, scale_1=scale_1)
        # A product that is dense in part takes inputs as they are.
        return {
            site.name: how
            for site, how in found.items()
            if all(module in made.linears for module in site.modules)
        }

    def _keep(self, made: CompressedBlock, tensors: dict[str, Tensor], run: Run) -> None:
        for module, linear in made.linears.items():
            n_bytes = self._store.linear(module, linear)
            run.linears += [_sized(facts, n_bytes, tensors) for facts in made.facts if facts.module == module]
        for name in sorted(made.changed):
            self._store.dense(name, _stored(made.tensors[name]))
        for facts in made.facts:
            if facts.module not in made.linears:
                weight = made.tensors[f"{facts.module}.weight"]
                run.linears.append(_sized(facts, weight.numel() * weight.element_size(), tensors))
        run.fallbacks += made.fallbacks

    def _compare(self, parent: Block, child: Block) -> Comparison:
        figures: list[list[NDArray[np.float64]]] = []
        for number, window in enumerate(self._windows):
            target_S = torch.tensor(window.tokens[window.n_context :]).to(self._on.torch)
            scored = slice(window.n_context - 1, -1)
            ours_SD, theirs_SD = self._child[number][scored], self._parent.last[number][scored]
            parts = [
                compare_tokens(child.logits(ours_SD[rows]), parent.logits(theirs_SD[rows]), target_S[rows])
                for rows in chunks_of(len(target_S), len(self._head_VD), self._on.torch)
            ]
            figures.append(on_host(parts, number + 1))
        return Comparison.of_windows(figures)


def refuse_fallbacks(fallbacks: Sequence[Fallback]) -> None:
    """Raise BuildError naming the first fallback, if there is one."""
    if fallbacks:
        first = fallbacks[0]
        raise BuildError(
            f"{first.where}: {first.why}; {len(fallbacks)} such",
            hint="calibrate with more text, or leave --strict out",
        )


def _sized(facts: LinearFacts, n_bytes: int, tensors: dict[str, Tensor]) -> LinearFacts:
    weight = tensors[f"{facts.module}.weight"]
    how = facts.how
    if (facts.n_out, facts.n_in) != weight.shape:
        how = "cut" if how == "kept" else f"cut, {how}"
    return msgspec.structs.replace(
        facts, how=how, n_bytes=n_bytes, dense_bytes=facts.n_out * facts.n_in * weight.element_size()
    )


def _stored(tensor: Tensor) -> StoredTensor:
    bits = tensor.contiguous().view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor.contiguous()
    array = bits.numpy()
    return StoredTensor(
        dtype=_STORED[tensor.dtype], array=array.view("<u2") if tensor.dtype == torch.bfloat16 else array
    )


def _drift(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return how far our states are from the parent's on the host, of the windows that it has there."""
    pairs = [(a.cpu().float(), b.float()) for a, b in zip(ours, theirs, strict=False)]
    wrong = sum(float((a - b).square().sum()) for a, b in pairs)
    size = sum(float(b.square().sum()) for _, b in pairs)
    return (wrong / size) ** 0.5 if size else 0.0


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - begin
