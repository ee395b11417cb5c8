"""Decides which decode steps are captured as CUDA graphs, and what they take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sailfish.base.config import EngineConfig
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.hardware.profile import MIB, HardwareProfile
from sailfish.kernels.choose import uncapturable
from sailfish.kernels.contract import Choice
from sailfish.plan.memory import captured_peak_bytes
from sailfish.plan.ops import LINEAR_OPS, choose_all, op_cases, workspaces
from sailfish.plan.settings import Settings
from sailfish.plan.types import Decision, MemoryLine

_STEPS = ((1, 1), (2, 2), (4, 4), (8, 8), (128, 16), (256, 32), (512, 64))
"""From so many runs on, the next bucket is so many further: padding is 7 rows up to 128, 12% above."""
_CHUNKS = (16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 2048)
"""A longer step computes for longer than the host takes to launch it kernel by kernel."""
_POOL_BYTES = 64 * MIB
"""What the pool holds beyond the largest step: it grows by 20 MiB at a time, unevenly cut."""
_GRAPH_BYTES = 2 * MIB
"""Driver memory of one captured step: some hundred kernels with their arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graphs:
    """The steps to capture, if any."""

    buckets: tuple[int, ...]
    """Runs of each captured decode, ascending; empty: nothing is captured."""
    chunks: tuple[int, ...]
    """Tokens of each captured step with prompts."""
    line: MemoryLine
    decision: Decision


def plan_graphs(
    config: EngineConfig, model: ModelConfig, hardware: HardwareProfile, settings: Settings
) -> Graphs:
    """Return what is captured, or nothing with the reason."""
    choices = choose_all(
        op_cases(
            model,
            target=hardware.target,
            dtype=settings.dtype,
            kv_dtype=settings.kv_dtype,
            page_tokens=settings.page_tokens,
            formats=settings.formats,
        )
    )
    obstacle = _obstacle(config, hardware, choices)
    requested = "on" if config.cuda_graphs else "off"
    if obstacle is not None:
        return Graphs(
            buckets=(),
            chunks=(),
            line=MemoryLine(name="graphs", bytes=0, why="no step is captured as a graph"),
            decision=Decision(
                name="cuda_graphs",
                requested=requested,
                active="off",
                why=obstacle,
                is_downgrade=config.cuda_graphs and hardware.device == "cuda",
            ),
        )
    buckets = decode_buckets(min(settings.max_sequences, settings.step_tokens))
    chunks = chunk_buckets(settings.step_tokens, settings.mixed_tokens)
    most = replace(settings, max_sequences=buckets[-1], step_tokens=max(buckets[-1], chunks[-1]))
    inside = workspaces(model, hardware.target, most)
    pool_bytes = captured_peak_bytes(
        model,
        settings.dtype,
        n_rows=buckets[-1],
        n_tokens=most.step_tokens,
        attention_workspace_bytes=inside["attention"],
        linear_workspace_bytes=max(inside[op] for op in LINEAR_OPS),
    )
    return Graphs(
        buckets=buckets,
        chunks=chunks,
        line=MemoryLine(
            name="graphs",
            bytes=pool_bytes + _POOL_BYTES + (len(buckets) + len(chunks)) * _GRAPH_BYTES,
            why=f"{len(buckets)} decodes of 1 to {buckets[-1]} sequences, {len(chunks)} steps of up to "
            f"{chunks[-1]} tokens, one pool of temporaries",
        ),
        decision=Decision(
            name="cuda_graphs",
            requested=requested,
            active="on",
            why=f"a decode of up to {buckets[-1]} sequences is one launch, as are the layers of a step "
            f"of up to {chunks[-1]} tokens with prompts",
        ),
    )


def decode_buckets(most: int) -> tuple[int, ...]:
    """Return the numbers of runs to capture a decode for: 1, 2, 4, 8, 16, 24 and so on, `most` the last."""
    found = [1]
    while found[-1] < most:
        n = found[-1]
        found.append(min(most, n + max(step for above, step in _STEPS if n >= above)))
    return tuple(found)


def chunk_buckets(step_tokens: int, mixed_tokens: int) -> tuple[int, ...]:
    """Return the numbers of tokens to capture a step with prompts for, none above `step_tokens`.

    Many steps have `mixed_tokens`, which are therefore one of them.
    """
    most = min(step_tokens, _CHUNKS[-1])
    return tuple(sorted({*(n for n in (*_CHUNKS, mixed_tokens) if n < most), most}))


def _obstacle(config: EngineConfig, hardware: HardwareProfile, choices: Iterable[Choice]) -> str | None:
    if not config.cuda_graphs:
        return "as asked"
    if hardware.device == "cpu":
        return "the CPU has no launches to save"
    held_up = uncapturable(choices)
    if held_up is None:
        return None
    return f"{held_up.op} is {held_up.implementation}, whose launches depend on what only the host knows"
