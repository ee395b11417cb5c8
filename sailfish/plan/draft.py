"""Drafts a plan that may be too large: settings first, then memory, then the KV blocks that are left."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from sailfish.base.config import EngineConfig
from sailfish.base.errors import PlanError
from sailfish.base.units import format_bytes, format_count
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.hardware.profile import MIB, HardwareProfile
from sailfish.plan.formats import arena_tensors, formats_of, is_quantised, words
from sailfish.plan.graphs import plan_graphs
from sailfish.plan.memory import (
    cache_specs,
    rope_bytes,
    step_peak_bytes,
    table_bytes,
    weights_bytes,
)
from sailfish.plan.ops import LINEAR_OPS, kept_index_bytes, workspaces
from sailfish.plan.overlay import DeviceOverlay
from sailfish.plan.settings import MIN_CONTEXT_TOKENS, Answers, Settings, settle
from sailfish.plan.types import CacheSpec, Decision, Dtype, MemoryLine, Plan, WeightFormats

_BUDGET_PERCENT = {"cpu": 80, "cuda": 90}
_CPU_KV_PERCENT = 25
"""Share of free memory that KV blocks take on the CPU unless asked for more: the machine is shared."""
_MARGIN_BYTES = {"cpu": 64 * MIB, "cuda": 128 * MIB}


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A plan with at least one full context of KV blocks, whether or not there is room for it."""

    plan: Plan
    budget_bytes: int
    budget_why: str
    kv_short_bytes: int
    """How far `kv_bytes`, where it was asked for, is from holding one full context."""

    @property
    def short_bytes(self) -> int:
        """Bytes by which the draft misses its limits; 0 or less: it fits."""
        return max(self.plan.total_bytes - self.budget_bytes, self.kv_short_bytes)


def draft(
    config: EngineConfig,
    model: ModelConfig,
    hardware: HardwareProfile,
    overlay: DeviceOverlay | None,
) -> Draft:
    """Draft the plan; a context left to "auto" is shortened until it fits, though not without end."""
    answers = Answers()
    weights = _weights_bytes(model, formats_of(config, model))
    settings = settle(config, model, hardware, weights, answers)
    budget = _budget(config, hardware)
    whole = _lay_out(config, model, hardware, overlay, weights, settings, answers, budget)
    if config.context_tokens is not None or _context_fits(whole, config, hardware):
        return whole
    page_tokens = settings.page_tokens
    low, high = -(-MIN_CONTEXT_TOKENS // page_tokens), (settings.context_tokens - 1) // page_tokens
    while low < high:
        middle = (low + high + 1) // 2
        shorter = replace(settings, context_tokens=middle * page_tokens)
        if _context_fits(
            _lay_out(config, model, hardware, overlay, weights, shorter, answers, budget), config, hardware
        ):
            low = middle
        else:
            high = middle - 1
    if low * page_tokens >= settings.context_tokens:
        return whole
    shorter = replace(settings, context_tokens=low * page_tokens)
    answers.downgrade(
        "context_tokens",
        shorter.context_tokens,
        f"the longest whose KV blocks fit; the checkpoint allows {format_count(model.context_tokens)}",
    )
    return _lay_out(config, model, hardware, overlay, weights, shorter, answers, budget)


def _context_fits(attempt: Draft, config: EngineConfig, hardware: HardwareProfile) -> bool:
    if attempt.short_bytes > 0:
        return False
    share = _default_kv_share(config, hardware)
    plan = attempt.plan
    block_bytes = plan.memory_bytes("kv_blocks") // plan.n_blocks
    return share is None or plan.blocks_per_sequence * block_bytes <= share


def _default_kv_share(config: EngineConfig, hardware: HardwareProfile) -> int | None:
    """Return the bytes KV blocks take by default, or None where they take all that is left."""
    if hardware.device == "cpu" and config.memory_bytes is None and config.kv_bytes is None:
        return hardware.free_bytes * _CPU_KV_PERCENT // 100
    return None


def _budget(config: EngineConfig, hardware: HardwareProfile) -> tuple[int, str]:
    if config.memory_bytes is None:
        percent = _BUDGET_PERCENT[hardware.device]
        return hardware.free_bytes * percent // 100, f"{percent}% of {format_bytes(hardware.free_bytes)} free"
    if config.memory_bytes > hardware.free_bytes:
        raise PlanError(
            f"memory_bytes {format_bytes(config.memory_bytes)} exceeds the "
            f"{format_bytes(hardware.free_bytes)} that are free on {hardware.name}",
            hint=f"ask for at most {hardware.free_bytes}, or leave memory_bytes to auto",
        )
    return config.memory_bytes, "memory_bytes"


def _lay_out(
    config: EngineConfig,
    model: ModelConfig,
    hardware: HardwareProfile,
    overlay: DeviceOverlay | None,
    weights: dict[Dtype, int],
    settings: Settings,
    answers: Answers,
    budget: tuple[int, str],
) -> Draft:
    cache = cache_specs(model, settings.kv_dtype)
    block_bytes = settings.page_tokens * sum(spec.bytes_per_token for spec in cache)
    graphs = plan_graphs(config, model, hardware, settings)
    fixed = _fixed_lines(model, hardware, overlay, weights, settings, graphs.line)
    left_bytes = budget[0] - sum(line.bytes for line in fixed)
    n_blocks, kv_why = _kv_blocks(config, hardware, settings, block_bytes, left_bytes)
    kv_line = MemoryLine(
        name="kv_blocks", bytes=n_blocks * block_bytes, why=_kv_words(kv_why, settings, n_blocks, cache)
    )
    one_context_bytes = settings.blocks_per_sequence * block_bytes
    plan = Plan(
        target=hardware.target,
        device=hardware.device,
        dtype=settings.dtype,
        formats=settings.formats,
        kv_dtype=settings.kv_dtype,
        page_tokens=settings.page_tokens,
        context_tokens=settings.context_tokens,
        max_sequences=settings.max_sequences,
        step_tokens=settings.step_tokens,
        mixed_tokens=settings.mixed_tokens,
        max_queue=settings.max_queue,
        n_blocks=n_blocks,
        lag=settings.lag,
        prefix_cache=config.prefix_cache,
        graph_buckets=graphs.buckets,
        graph_chunks=graphs.chunks,
        cache=cache,
        memory=(fixed[0], kv_line, *fixed[1:]),
        decisions=(
            *answers.decisions,
            graphs.decision,
            *_memory_decisions(config, budget, n_blocks, settings, kv_line),
        ),
    )
    return Draft(
        plan=plan,
        budget_bytes=budget[0],
        budget_why=budget[1],
        kv_short_bytes=0 if config.kv_bytes is None else one_context_bytes - config.kv_bytes,
    )


def _fixed_lines(
    model: ModelConfig,
    hardware: HardwareProfile,
    overlay: DeviceOverlay | None,
    weights: dict[Dtype, int],
    settings: Settings,
    graphs: MemoryLine,
) -> list[MemoryLine]:
    """Account for everything but KV blocks; weights first."""
    inside = workspaces(model, hardware.target, settings)
    peak_bytes, phase = step_peak_bytes(
        model,
        settings.dtype,
        step_tokens=settings.step_tokens,
        max_sequences=settings.max_sequences,
        attention_workspace_bytes=inside["attention"],
        moe_workspace_bytes=inside["moe"],
        linear_workspace_bytes=max(inside[op] for op in LINEAR_OPS),
        index_bytes=kept_index_bytes(hardware.target, settings),
    )
    tables = rope_bytes(model, settings.context_tokens) + table_bytes(
        max_sequences=settings.max_sequences,
        context_tokens=settings.context_tokens,
        page_tokens=settings.page_tokens,
    )
    runtime = hardware.runtime_bytes if overlay is None else overlay.runtime_bytes
    return [
        MemoryLine(name="weights", bytes=weights[settings.dtype], why=_weights_words(settings)),
        MemoryLine(
            name="activations",
            bytes=peak_bytes,
            why=f"peak of a step of {settings.step_tokens} tokens, in its {phase}",
        ),
        graphs,
        MemoryLine(
            name="workspaces",
            bytes=tables,
            why=f"rotary angles of {format_count(settings.context_tokens)} positions, "
            f"{settings.max_sequences} rows of tokens, blocks and sampling parameters",
        ),
        MemoryLine(
            name="runtime",
            bytes=runtime,
            why="measured on this device" if overlay else "typical of the device; measured at first start",
        ),
        MemoryLine(
            name="margin", bytes=_MARGIN_BYTES[hardware.device], why="allocator rounding and fragmentation"
        ),
    ]


@lru_cache(maxsize=16)
def _weights_bytes(model: ModelConfig, formats: WeightFormats) -> dict[Dtype, int]:
    """Return the arena's size for each plain dtype; many drafts of a model ask for it."""
    tensors = arena_tensors(model, formats)
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    return {dtype: weights_bytes(tensors, dtype) for dtype in dtypes}


def _weights_words(settings: Settings) -> str:
    if not is_quantised(settings.formats):
        return f"one arena in {settings.dtype}"
    return f"one arena: {words(settings.formats)}, the rest in {settings.dtype}"


def _kv_blocks(
    config: EngineConfig, hardware: HardwareProfile, settings: Settings, block_bytes: int, left_bytes: int
) -> tuple[int, str]:
    """Return how many blocks to allocate, at least one full context, and the reason."""
    least = settings.blocks_per_sequence
    share_bytes = _default_kv_share(config, hardware)
    if config.kv_bytes is not None:
        return max(least, config.kv_bytes // block_bytes), "kv_bytes"
    if hardware.device == "cuda":
        return max(least, left_bytes // block_bytes), "all memory that is left"
    wanted = least * settings.max_sequences
    room_bytes = left_bytes if share_bytes is None else min(left_bytes, share_bytes)
    room = max(least, room_bytes // block_bytes)
    if wanted <= room:
        return wanted, f"{settings.max_sequences} sequences of full context"
    if share_bytes is None or left_bytes < share_bytes:
        return room, "all memory that is left"
    return room, f"{_CPU_KV_PERCENT}% of free memory"


def _kv_words(why: str, settings: Settings, n_blocks: int, cache: tuple[CacheSpec, ...]) -> str:
    words = f"{why}: {n_blocks} blocks of {settings.page_tokens} tokens"
    if any(spec.kind == "window" for spec in cache):
        words += "; window layers keep all blocks, since layers share one block table"
    return words


def _memory_decisions(
    config: EngineConfig, budget: tuple[int, str], plan_blocks: int, settings: Settings, kv_line: MemoryLine
) -> list[Decision]:
    full = plan_blocks / settings.blocks_per_sequence
    return [
        Decision(
            name="memory_bytes",
            requested=_asked(config.memory_bytes),
            active=str(budget[0]),
            why="as asked" if config.memory_bytes is not None else budget[1],
        ),
        Decision(
            name="kv_bytes",
            requested=_asked(config.kv_bytes),
            active=str(kv_line.bytes),
            why=f"holds {full:.1f} sequences of full context at once, more when they are shorter",
        ),
    ]


def _asked(value: int | None) -> str:
    return "auto" if value is None else str(value)
