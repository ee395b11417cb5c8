"""What a scheduler may use, as the plan decided it."""

from __future__ import annotations

from dataclasses import dataclass

from sailfish.base.errors import ConfigError
from sailfish.plan.types import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What a scheduler may use."""

    max_sequences: int
    """Rows of the device table."""
    step_tokens: int
    context_tokens: int
    max_queue: int
    page_tokens: int
    n_blocks: int
    lag: int
    """Steps in flight when another one is planned: 0 or 1."""
    prefix_cache: bool = True
    watermark_blocks: int = 0
    """Blocks that admission leaves to the sequences already running."""

    def __post_init__(self) -> None:
        needed = -(-self.context_tokens // self.page_tokens)
        if self.n_blocks < needed:
            raise ConfigError(
                f"{self.n_blocks} KV blocks of {self.page_tokens} tokens cannot hold one context of "
                f"{self.context_tokens} tokens; give at least {needed} blocks or shorten context_tokens"
            )
        if self.step_tokens < 1 or self.max_sequences < 1 or self.lag not in (0, 1):
            raise ConfigError(
                f"step_tokens {self.step_tokens} and max_sequences {self.max_sequences} must be at least 1, "
                f"lag {self.lag} must be 0 or 1"
            )

    @classmethod
    def of(cls, plan: Plan) -> SchedulerLimits:
        """Take the limits that a plan decided; the watermark is one block in 64."""
        return cls(
            max_sequences=plan.max_sequences,
            step_tokens=plan.step_tokens,
            context_tokens=plan.context_tokens,
            max_queue=plan.max_queue,
            page_tokens=plan.page_tokens,
            n_blocks=plan.n_blocks,
            lag=plan.lag,
            prefix_cache=plan.prefix_cache,
            watermark_blocks=plan.n_blocks // 64,
        )
