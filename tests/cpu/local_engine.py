"""An engine in this process: boot, scheduler, loop and runner, without the socket."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sailfish.base.config import EngineConfig
from sailfish.build.builder import build_engine
from sailfish.engine import wire
from sailfish.engine.api import TokenLogprob
from sailfish.engine.boot import boot
from sailfish.engine.limits import SchedulerLimits
from sailfish.engine.loop import EngineLoop
from sailfish.engine.scheduler import Scheduler
from sailfish.engine.step import RowSampling

CLIENT = 0


def greedy(vocab_size: int, **changes: object) -> RowSampling:
    """Sampling that takes the likeliest token, but for `changes`."""
    values: dict[str, object] = {
        "temperature": 0.0,
        "top_k": vocab_size,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": 0,
        "min_tokens": 0,
        "stop_token_ids": (),
    }
    return RowSampling(**{**values, **changes})  # type: ignore[arg-type]


@dataclass
class Heard:
    """What a client heard of one sequence."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None
    n_cached: int = 0
    finishes: list[wire.Finish] = field(default_factory=list)


class LocalEngine:
    """Submit sequences, run steps, read what a client would have heard."""

    def __init__(self, engine_dir: Path, config: EngineConfig) -> None:
        # As many threads as the suite says: each parallel region waits for cores that others may have.
        self.booted = boot(engine_dir, config, {"OMP_NUM_THREADS": ""}, lambda *_: None)
        plan = self.booted.plan
        self.heard: dict[int, Heard] = {}
        self.refused: dict[int, wire.Refused] = {}
        self.scheduler = Scheduler(SchedulerLimits.of(plan), engine_digest="test", kv_dtype=plan.dtype)
        self.loop = EngineLoop(self.scheduler, self.booted.runner, self._hear, plan.lag, lambda: 0)

    @classmethod
    def build(cls, checkpoint: Path, to: Path, config: EngineConfig) -> LocalEngine:
        """Build the checkpoint's engine at `to`, unless it is there, and open it."""
        if not to.exists():
            build_engine(checkpoint, to, target="cpu")
        return cls(to, config)

    def submit(
        self, key: int, prompt: list[int], sampling: RowSampling, max_tokens: int | None, tenant: str = ""
    ) -> None:
        """Hand over one sequence."""
        self.tell(wire.Submit(key, prompt, sampling, max_tokens, 0, None, tenant))

    def tell(self, message: wire.ToEngine) -> None:
        """Hand the loop a client's message."""
        self.loop.inbox.put((CLIENT, message))
        self.loop._take_messages(None)

    def run(self, max_steps: int = 20_000) -> dict[int, Heard]:
        """Step until nothing is left, and return what was heard."""
        for _ in range(max_steps):
            if self.scheduler.is_idle and not self.loop._in_flight:
                return self.heard
            self.loop.step()
        raise AssertionError(f"not idle after {max_steps} steps")

    def _hear(self, client: int, message: wire.ToClient) -> None:
        assert client == CLIENT
        match message:
            case wire.Refused(key=key):
                self.refused[key] = message
            case wire.Events(items=items):
                for event in items:
                    heard = self.heard.setdefault(event.key, Heard())
                    assert not heard.finishes, "news after the end"
                    heard.token_ids += event.token_ids
                    heard.logprobs += event.logprobs or []
                    heard.n_cached = max(heard.n_cached, event.n_cached)
                    if event.prompt_logprobs is not None:
                        assert heard.prompt_logprobs is None
                        heard.prompt_logprobs = event.prompt_logprobs
                    if event.finish is not None:
                        heard.finishes.append(event.finish)
