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
    """Of any step, at most."""
    context_tokens: int
    max_queue: int
    page_tokens: int
    n_blocks: int
    lag: int
    """Steps in flight when another one is planned: 0 or 1."""
    mixed_tokens: int | None = None
    """Of a step in which sequences decode, though prompts have a quarter of it at least; None: no limit."""
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
        mixed_tokens = self.step_tokens if self.mixed_tokens is None else self.mixed_tokens
        if min(self.step_tokens, self.max_sequences, mixed_tokens) < 1 or self.lag not in (0, 1):
            raise ConfigError(
                f"step_tokens {self.step_tokens}, mixed_tokens {mixed_tokens} and max_sequences "
                f"{self.max_sequences} must be at least 1, lag {self.lag} must be 0 or 1"
            )

    def prompt_tokens_beside(self, n_decodes: int) -> int:
        """Return how many tokens of prompts a step may compute that decodes so many sequences.

        They wait for it: it is as long as its tokens, these and theirs, are many.
        """
        if self.mixed_tokens is None:
            return self.step_tokens
        return max(self.mixed_tokens - n_decodes, -(-self.mixed_tokens // 4))

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
            mixed_tokens=plan.mixed_tokens,
            prefix_cache=plan.prefix_cache,
            watermark_blocks=plan.n_blocks // 64,
        )
