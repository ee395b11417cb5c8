"""From an engine directory to a runner that has proven its largest step: plan, allocate, load, warm up."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sailfish.artifact.reader import Artifact
from sailfish.artifact.side import MAX_RUNTIME_BYTES, write_overlay
from sailfish.artifact.start import plan_start, software
from sailfish.base.config import EngineConfig
from sailfish.base.errors import ArtifactError
from sailfish.base.units import format_bytes
from sailfish.engine.api import MemoryReading
from sailfish.engine.graphs import StepGraphs
from sailfish.engine.meter import Meter
from sailfish.engine.runner import Runner
from sailfish.engine.table import DeviceTable
from sailfish.engine.warm import warm_up
from sailfish.hardware.memory import prefer_large_pages
from sailfish.hardware.probe import probe
from sailfish.kernels.choose import bind
from sailfish.models.arena import arena_layout
from sailfish.models.decoder import Decoder, KvCache
from sailfish.models.load import CACHE_DTYPES, assemble, load_weights
from sailfish.plan.formats import arena_tensors
from sailfish.plan.memory import SCALE_BYTES
from sailfish.plan.overlay import DeviceOverlay
from sailfish.plan.types import Plan

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Booted:
    """An engine that can take its first request."""

    artifact: Artifact
    plan: Plan
    runner: Runner
    memory: list[MemoryReading]
    downgrades: list[str]
    launches: dict[int, dict[str, int]]
    """Launches of each kernel in a captured decode of up to so many sequences."""


def boot(
    engine_dir: Path,
    config: EngineConfig,
    environ: Mapping[str, str],
    on_progress: Callable[[str, str], None],
) -> Booted:
    """Open, plan, allocate and load an engine, then run one step at the largest planned shape.

    After it returns, device memory stays as it is. Raises ArtifactError, PlanError or ConfigError.
    """
    artifact = Artifact.open(engine_dir)
    manifest = artifact.manifest
    hardware = probe(config.device or manifest.plan.device, environ=environ)
    if hardware.target != manifest.target:
        raise ArtifactError(
            f"{engine_dir} was built for {manifest.target}, but {hardware.name} is {hardware.target}",
            hint=f"build it again with --target {hardware.target}",
        )
    start = plan_start(artifact, config, hardware)
    plan = start.plan
    on_progress("plan", f"{format_bytes(plan.total_bytes)} on {hardware.name}")

    device = torch.device(plan.device)
    if plan.device == "cpu" and "OMP_NUM_THREADS" not in environ:
        torch.set_num_threads(hardware.n_cores)
    meter = Meter(device, idle_free_bytes=hardware.free_bytes)
    tensors = arena_tensors(manifest.model, plan.formats)
    _, arena_bytes = arena_layout(tensors, plan.dtype)
    arena = torch.empty(arena_bytes, dtype=torch.uint8, device=device)
    if plan.device == "cpu":
        prefer_large_pages(arena.data_ptr(), arena_bytes)
    arena.zero_()
    pieces = {tensor.name: tensor.pieces for tensor in artifact.tensors()}
    weights = assemble(manifest.model, plan.formats, load_weights(tensors, pieces, arena, plan.dtype))
    meter.mark("weights")
    on_progress("weights", format_bytes(arena_bytes))

    model = manifest.model
    shape = (model.n_layers, 2, plan.n_blocks, plan.page_tokens, model.n_kv_heads, model.head_dim)
    # Filled, not merely reserved: a page that the system had only promised would count later.
    cache = torch.empty(shape, dtype=CACHE_DTYPES[plan.kv_dtype], device=device).fill_(0)
    has_scales = SCALE_BYTES[plan.kv_dtype] > 0
    kv = KvCache.of(cache, torch.ones(shape[:-1], device=device) if has_scales else None)
    meter.mark("kv_blocks")
    decoder = Decoder(model, weights, bind(start.ops), max_positions=plan.context_tokens)
    table = DeviceTable(
        plan.max_sequences, plan.context_tokens, plan.blocks_per_sequence, plan.page_tokens, device
    )
    meter.mark("workspaces")
    runner = Runner(decoder, kv, table, StepGraphs(plan.graph_buckets, plan.graph_chunks))
    warm_up(runner, plan, model.vocab_size)
    meter.mark("activations")
    on_progress("warm-up", f"one step of {plan.step_tokens} tokens and {plan.max_sequences} sequences")
    if plan.graph_buckets:
        runner.capture()
        on_progress("graphs", f"decodes of up to {plan.graph_buckets[-1]} sequences captured")
        meter.mark("graphs")
    gc.collect()
    gc.freeze()  # what lives now lives for ever: the collector need not look at it again
    runtime_bytes, launches = meter.runtime_bytes, runner.launches()
    if start.overlay is None and runtime_bytes <= MAX_RUNTIME_BYTES:
        _remember(
            artifact,
            DeviceOverlay(
                device_key=hardware.key,
                software=software(),
                runtime_bytes=runtime_bytes,
                launches=launches,
            ),
        )
    return Booted(
        artifact=artifact,
        plan=plan,
        runner=runner,
        memory=meter.readings(plan),
        downgrades=start.downgrades,
        launches=launches,
    )


def _remember(artifact: Artifact, overlay: DeviceOverlay) -> None:
    try:
        write_overlay(artifact, overlay)
    except ArtifactError as error:  # a read-only engine directory serves as well
        log.warning("%s; the next start measures again", error)
