"""What the scheduler tells the runner to do in one step, and what comes back: plain ints, typed bytes.

A plan holds differences only. The runner keeps a device table with one row per live sequence; a plan
writes the rows that begin, appends blocks to rows, and lists the spans of tokens to run.
"""

from __future__ import annotations

import msgspec

from sailfish.engine.api import TokenLogprob


class RowSampling(msgspec.Struct, frozen=True, array_like=True):
    """Sampling parameters of one row with every default resolved."""

    temperature: float
    top_k: int
    """The vocabulary size when not limited."""
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    """Signed 64-bit."""
    min_tokens: int
    stop_token_ids: tuple[int, ...]
    """Tokens that end the text; they cannot be drawn before `min_tokens`."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class RowStart(msgspec.Struct, frozen=True, array_like=True):
    """A row that begins: a new sequence, or a preempted one that is computed again."""

    row: int
    token_ids: list[int]
    """Prompt and, after a preemption, the tokens generated so far."""
    n_prompt: int
    block_ids: list[int]
    """Blocks held so far, in position order; the first of them may come from the prefix cache."""
    sampling: RowSampling


class RowRun(msgspec.Struct, frozen=True, array_like=True):
    """Compute positions start .. start + count of a row; `samples`: draw the token that follows."""

    row: int
    start: int
    count: int
    samples: bool


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """One step. Rows run in the order of `runs`."""

    step_id: int
    starts: list[RowStart]
    appended: list[tuple[int, int, int]]
    """(row, index in the row's block list, block id)."""
    runs: list[RowRun]

    @property
    def n_tokens(self) -> int:
        """Tokens computed in this step (T)."""
        return sum(run.count for run in self.runs)


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """What one step produced, one entry for each run that samples, in the plan's order."""

    step_id: int
    token_ids: list[int]
    finite: list[bool]
    """False where the row's logits were not finite; its token is meaningless."""
    logprobs: list[TokenLogprob | None]
    prompt_logprobs: list[list[TokenLogprob]]
    """One list for each run (sampling or not): the prompt tokens that its positions predict."""


def encode(value: StepPlan | StepResult) -> bytes:
    """Return the value as MessagePack: what tests, other ranks and the runner consume alike."""
    return msgspec.msgpack.encode(value)


def decode_plan(data: bytes) -> StepPlan:
    """Inverse of `encode` for a plan."""
    return msgspec.msgpack.decode(data, type=StepPlan)


def decode_result(data: bytes) -> StepResult:
    """Inverse of `encode` for a result."""
    return msgspec.msgpack.decode(data, type=StepResult)
