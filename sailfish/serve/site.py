"""What every part of one API process shares: the engine, the name it serves, and the requests alive."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from sailfish.base.errors import RequestAborted
from sailfish.serve.gateway.auth import KeyRing
from sailfish.serve.gateway.limits import LIMITS, Limits
from sailfish.serve.metrics.counters import Counters
from sailfish.serve.port import EnginePort
from sailfish.serve.tether import Tether


@dataclass(slots=True, kw_only=True)
class Site:
    """One API process."""

    engine: EnginePort
    model: str
    """Name that requests use for the model."""
    keys: KeyRing
    origins: frozenset[str] = frozenset()
    """Origins that CORS lets in, compared exactly."""
    limits: Limits = LIMITS
    vllm_metrics: bool = True
    counters: Counters = field(default_factory=Counters)
    live: set[Tether] = field(default_factory=set)
    """Requests at work now."""
    draining: bool = False
    started_unix_s: int = field(default_factory=lambda: int(time.time()))

    def not_ready(self) -> str | None:
        """Return why requests are not taken, or None."""
        return "the server is draining" if self.draining else self.engine.ready

    def interrupt(self) -> None:
        """End every request at work with an error its client is told."""
        for tether in list(self.live):
            tether.interrupt(RequestAborted("the server is stopping", retry_after_s=1.0))
