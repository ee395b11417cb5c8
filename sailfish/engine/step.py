"""What the scheduler tells the runner to do in one step, and what comes back: plain ints, typed bytes.

A plan holds differences only. The runner keeps a device table with one row per live sequence; a plan
writes the rows that begin, appends blocks to rows, and lists the rows that decode and the spans of tokens
to run.
"""

from __future__ import annotations

from array import array

import msgspec

from sailfish.engine.api import TokenLogprob

_INT_BYTES = array("i").itemsize


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
    """One step: the decodes in their order, then `spans` in theirs.

    A decode computes one position and draws; most runs are such, and two arrays hold them all.
    """

    step_id: int
    starts: list[RowStart]
    appended: list[tuple[int, int, int]]
    """(row, index in the row's block list, block id)."""
    spans: list[RowRun]
    """Runs of any length, after the decodes."""
    decode_rows: bytes = b""
    """The decodes' rows, int32 of this machine."""
    decode_starts: bytes = b""
    """The positions that they compute, likewise."""

    @property
    def n_decodes(self) -> int:
        """Runs that are in the arrays."""
        return len(self.decode_rows) // _INT_BYTES

    @property
    def n_runs(self) -> int:
        """Runs in all (B)."""
        return self.n_decodes + len(self.spans)

    @property
    def n_tokens(self) -> int:
        """Tokens computed in this step (T)."""
        return self.n_decodes + sum(run.count for run in self.spans)

    @property
    def runs(self) -> list[RowRun]:
        """Every run in the step's order, one object each: for reading, not for every step."""
        rows, starts = array("i", self.decode_rows), array("i", self.decode_starts)
        return [RowRun(row, start, 1, True) for row, start in zip(rows, starts, strict=True)] + self.spans


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """What one step produced, one entry for each run that samples, in the plan's order."""

    step_id: int
    token_ids: list[int]
    finite: list[bool]
    """False where the row's logits were not finite; its token is meaningless."""
    logprobs: list[TokenLogprob | None]
    prompt_logprobs: list[list[TokenLogprob]]
    """One list for each of the plan's `spans` (sampling or not): the prompt tokens that its positions
    predict. A decode predicts none."""


def encode(value: StepPlan | StepResult) -> bytes:
    """Return the value as MessagePack: what tests, other ranks and the runner consume alike."""
    return msgspec.msgpack.encode(value)


def decode_plan(data: bytes) -> StepPlan:
    """Inverse of `encode` for a plan."""
    return msgspec.msgpack.decode(data, type=StepPlan)


def decode_result(data: bytes) -> StepResult:
    """Inverse of `encode` for a result."""
    return msgspec.msgpack.decode(data, type=StepResult)
