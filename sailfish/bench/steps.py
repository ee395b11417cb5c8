"""What the host does in a decode step and how long the GPU rests: an engine process that watches itself."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from sailfish.base.config import EngineConfig
from sailfish.base.errors import EngineError
from sailfish.bench.asking import ask_together, random_prompt
from sailfish.bench.child import child
from sailfish.engine.client import AsyncEngine

SETTLE_STEPS = 8
"""Full decodes that do not count."""
WINDOWS, WINDOW_STEPS = 3, 48
TRACED_STEPS = 60
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 320
"""Of each request: all of them decode together for long enough, whoever began first."""
_REPORT_S = 30.0
Span = tuple[float, float]


class Watched(msgspec.Struct, frozen=True, kw_only=True):
    """What the decode steps of so many sequences were seen to take."""

    batch: int
    host_us: list[float]
    """Processor time of the engine's loop in a step without its wait for the device, of each window."""
    step_us: list[float]
    """A step from its beginning to the next one's, of the same windows, which nothing traces."""
    idle_percent: list[float] = []
    """Share of the time in which no kernel and no copy runs, of each window of a profiler's trace."""
    kernel_us: dict[str, float] = {}
    """Of each kernel in a step of that trace; kernels that begin early overlap."""

    def figures(self) -> Iterator[tuple[str, Sequence[float], str]]:
        """Yield (row, values, unit)."""
        yield host_row(self.batch), self.host_us, "us"
        if self.idle_percent:
            yield idle_row(self.batch), self.idle_percent, "%"


def host_row(batch: int) -> str:
    """Return the name of the row of the host's work."""
    return f"host work a step B={batch}"


def idle_row(batch: int) -> str:
    """Return the name of the row of the GPU's rest."""
    return f"gpu idle B={batch}"


async def watch(engine_dir: Path, config: EngineConfig, batches: Sequence[int]) -> AsyncIterator[Watched]:
    """Ask a watched engine process for answers of so many requests at once, each batch in turn."""
    draw = random.Random(2)
    with tempfile.TemporaryDirectory(prefix="sailfish-") as folder:
        socket_path = Path(folder) / "engine.sock"
        flags = [
            *("--engine", str(engine_dir), "--socket", str(socket_path)),
            *("--config", msgspec.json.encode(config).decode()),
            *("--batches", ",".join(map(str, batches))),
        ]
        with child("sailfish.bench.watched", *flags) as process:
            async with await AsyncEngine.attach(socket_path) as engine:
                n_out = min(OUTPUT_TOKENS, engine.info.context_tokens - PROMPT_TOKENS)
                for batch in batches:
                    prompts = [random_prompt(draw, engine, PROMPT_TOKENS) for _ in range(batch)]
                    await ask_together(engine, prompts, n_out)
                    try:
                        line = await asyncio.wait_for(asyncio.to_thread(process.line), _REPORT_S)
                    except TimeoutError:
                        raise EngineError(
                            f"{batch} requests never decoded together for long enough"
                        ) from None
                    yield msgspec.json.decode(line, type=Watched)


def idle_percent(spans: Sequence[Span], begin: float, end: float) -> float:
    """Return how much of begin .. end no span covers."""
    covered, at = 0.0, begin
    for first, last in sorted(spans):
        first, last = max(first, at), min(last, end)
        if last > first:
            covered += last - first
            at = last
    return 100.0 * (1.0 - covered / (end - begin))


def parts_of(begin: float, end: float, n: int) -> list[Span]:
    """Return `n` equal parts of begin .. end."""
    length = (end - begin) / n
    return [(begin + i * length, begin + (i + 1) * length) for i in range(n)]


def kernel_us(spans: Mapping[str, Sequence[Span]], n_steps: int) -> dict[str, float]:
    """Return the microseconds a step of each kernel's name, the longest first."""
    sums = {name: sum(end - begin for begin, end in found) / n_steps for name, found in spans.items()}
    return {name: round(us, 2) for name, us in sorted(sums.items(), key=lambda item: -item[1])}
