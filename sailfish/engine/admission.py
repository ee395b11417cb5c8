"""Decides whether a sequence may enter the queue, with a reason and a retry time when it may not."""

from __future__ import annotations

from sailfish.base.errors import ContextTooLong, Overloaded, RequestError
from sailfish.engine.sequence import Sequence

_DRAIN_RETRY_S = 5.0
_MIN_RETRY_S = 1.0
_MAX_RETRY_S = 60.0
_DECAY = 0.95  # a measurement's weight halves in 14 steps


class Forecast:
    """Predicts waiting times from the steps measured so far."""

    def __init__(self) -> None:
        self._prefill_tokens = self._prefill_s = 0.0
        self._steps = self._steps_s = 0.0

    def observe(self, n_tokens: int, n_runs: int, elapsed_s: float) -> None:
        """Count one step that computed `n_tokens` for `n_runs` sequences."""
        self._steps = self._steps * _DECAY + 1.0
        self._steps_s = self._steps_s * _DECAY + elapsed_s
        if n_tokens > n_runs:  # some run computed a piece of a prompt
            self._prefill_tokens = self._prefill_tokens * _DECAY + n_tokens
            self._prefill_s = self._prefill_s * _DECAY + elapsed_s

    def compute_s(self, n_tokens: int) -> float | None:
        """Return the seconds to compute `n_tokens` of prompts; None before the first measurement."""
        if self._prefill_s <= 0.0:
            return None
        return n_tokens * self._prefill_s / self._prefill_tokens

    def decode_s(self, n_tokens: int) -> float:
        """Return the seconds to draw `n_tokens` one after another."""
        return n_tokens * self._steps_s / self._steps if self._steps else 0.0


class Admission:
    """The door of the queue."""

    def __init__(self, *, context_tokens: int, max_queue: int) -> None:
        self.forecast = Forecast()
        self.is_draining = False
        self._context_tokens = context_tokens
        self._max_queue = max_queue

    def check(self, sequence: Sequence, *, n_waiting: int, backlog_tokens: int, now_s: float) -> None:
        """Raise why the sequence cannot enter.

        `backlog_tokens` are the positions to compute before its own. RequestError and ContextTooLong: it
        never can. Overloaded: not now.
        """
        self._check_shape(sequence)
        if self.is_draining:
            raise Overloaded("the engine is stopping and takes no new requests", retry_after_s=_DRAIN_RETRY_S)
        if n_waiting >= self._max_queue:
            raise Overloaded(
                f"{n_waiting} requests are waiting and the queue holds {self._max_queue}",
                hint="send less at once, or raise max_queue",
                retry_after_s=self._retry_s(backlog_tokens),
            )
        self._check_deadline(sequence, backlog_tokens, now_s)

    def _check_shape(self, sequence: Sequence) -> None:
        context = self._context_tokens
        n_prompt = sequence.n_prompt
        if n_prompt == 0:
            raise RequestError("the prompt has no tokens; send at least one", param="prompt")
        if sequence.max_tokens is not None and sequence.max_tokens < 1:
            raise RequestError(
                f"max_tokens is {sequence.max_tokens}; it must be at least 1", param="max_tokens"
            )
        if n_prompt >= context:
            raise ContextTooLong(
                f"the prompt has {n_prompt} tokens and the context holds {context}, answer included; "
                f"shorten it to at most {context - 1}",
                param="prompt",
            )
        if sequence.max_tokens is not None and n_prompt + sequence.max_tokens > context:
            raise ContextTooLong(
                f"{n_prompt} prompt tokens and max_tokens {sequence.max_tokens} exceed the context of "
                f"{context} tokens; ask for at most {context - n_prompt}",
                param="max_tokens",
            )

    def _check_deadline(self, sequence: Sequence, backlog_tokens: int, now_s: float) -> None:
        if sequence.deadline_s is None:
            return
        compute_s = self.forecast.compute_s(backlog_tokens + sequence.n_prompt)
        if compute_s is None:
            return
        # An answer may end early, so only the tokens it cannot do without count.
        needed_s = compute_s + self.forecast.decode_s(max(0, sequence.sampling.min_tokens - 1))
        allowed_s = sequence.deadline_s - now_s
        if needed_s > allowed_s:
            raise Overloaded(
                f"the deadline is {max(allowed_s, 0.0):.2f} s away and the answer is expected to need at "
                f"least {needed_s:.2f} s; retry later or allow more time",
                retry_after_s=self._retry_s(backlog_tokens),
            )

    def _retry_s(self, backlog_tokens: int) -> float:
        backlog_s = self.forecast.compute_s(backlog_tokens) or 0.0
        return min(max(backlog_s, _MIN_RETRY_S), _MAX_RETRY_S)
