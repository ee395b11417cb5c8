"""What every part of one API process shares: who may come in, the engine, and the requests alive."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from sailfish.base.config import ServeConfig
from sailfish.base.errors import RequestAborted
from sailfish.serve.gateway.auth import KeyRing, load_keys
from sailfish.serve.gateway.limits import LIMITS, Limits
from sailfish.serve.metrics.counters import Counters
from sailfish.serve.port import EnginePort
from sailfish.serve.tether import Tether


@dataclass(slots=True, kw_only=True)
class Door:
    """Who may come in, and whether anyone may yet."""

    keys: KeyRing
    origins: frozenset[str] = frozenset()
    """Origins that CORS lets in, compared exactly."""
    limits: Limits = LIMITS
    counters: Counters = field(default_factory=Counters)
    closed: str | None = None
    """Why this process takes no requests, or None."""
    closed_code: str = "draining"
    """The error code that goes with `closed`."""

    @classmethod
    def of(cls, config: ServeConfig, limits: Limits = LIMITS) -> Door:
        """Read the keys and origins of a configuration."""
        origins = frozenset(o.strip() for o in (config.cors_origins or "").split(",") if o.strip())
        return cls(keys=load_keys(config), origins=origins, limits=limits)

    def not_ready(self) -> str | None:
        """Return why requests are not taken, or None."""
        return self.closed


@dataclass(slots=True, kw_only=True)
class Site(Door):
    """One API process at work."""

    engine: EnginePort
    model: str
    """Name that requests use for the model."""
    vllm_metrics: bool = True
    live: set[Tether] = field(default_factory=set)
    """Requests at work now."""
    started_unix_s: int = field(default_factory=lambda: int(time.time()))

    def not_ready(self) -> str | None:
        """Return why requests are not taken, or None."""
        return self.closed or self.engine.ready

    def interrupt(self) -> None:
        """End every request at work with an error its client is told."""
        for tether in list(self.live):
            tether.interrupt(RequestAborted("the server is stopping", retry_after_s=1.0))
