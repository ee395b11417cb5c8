"""What the scheduler keeps of a step until its result: who ran, and what the commit has to do."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from sailfish.engine.api import TokenLogprob
from sailfish.engine.sequence import Sequence
from sailfish.engine.step import RowRun, RowStart, StepPlan, StepResult


@dataclass(slots=True, kw_only=True)
class Flight:
    """A step being planned or in flight."""

    planned_s: float
    n_tokens: int = 0
    starts: list[RowStart] = field(default_factory=list)
    appended: list[tuple[int, int, int]] = field(default_factory=list)
    spans: list[RowRun] = field(default_factory=list)
    spanned: list[Sequence] = field(default_factory=list)
    """The sequences of `spans`."""
    decodes: list[Sequence] = field(default_factory=list)
    decode_rows: bytes = b""
    decode_starts: bytes = b""
    """Of `decodes`, as the plan has them."""
    filled: list[Sequence] = field(default_factory=list)
    """Decodes that fill a block."""
    told: list[Sequence] = field(default_factory=list)
    """Decodes whose draw is the first or the last of its sequence, so that there is more to tell."""
    voided: set[Sequence] = field(default_factory=set)
    """Sequences whose results do not count any more."""

    @property
    def sequences(self) -> list[Sequence]:
        """All that the step runs, in its order."""
        return self.decodes + self.spanned

    @property
    def n_runs(self) -> int:
        """Sequences that the step runs."""
        return len(self.decodes) + len(self.spanned)

    def decode(self, sequences: list[Sequence]) -> None:
        """Run one position of sequences that are one behind, each of which draws."""
        self.decodes = sequences
        self.decode_rows = array("i", [s.row for s in sequences if s.row is not None]).tobytes()
        self.decode_starts = array("i", [sequence.n_computed for sequence in sequences]).tobytes()
        for sequence in sequences:
            sequence.n_computed += 1
            sequence.n_wanted += 1

    def advance(self, sequence: Sequence, count: int) -> None:
        """Run the next positions of a sequence; it draws if nothing of it is left to compute."""
        assert sequence.row is not None
        samples = count == sequence.n_left
        self.spans.append(RowRun(sequence.row, sequence.n_computed, count, samples))
        self.spanned.append(sequence)
        sequence.n_computed += count
        sequence.n_wanted += samples

    def plan(self, step_id: int) -> StepPlan:
        """Return what the runner is to do."""
        return StepPlan(step_id, self.starts, self.appended, self.spans, self.decode_rows, self.decode_starts)

    def sift(
        self, result: StepResult, told: dict[Sequence, TokenLogprob | None]
    ) -> tuple[list[Sequence], list[int], list[Sequence]]:
        """Return the decodes that count, their tokens, and the decodes whose logits were not finite.

        Only those that count remain in `told`, where the log-probabilities go.
        """
        sequences: list[Sequence] = []
        token_ids: list[int] = []
        not_finite: list[Sequence] = []
        for i, sequence in enumerate(self.decodes):
            if sequence in self.voided or not result.finite[i]:
                told.pop(sequence, None)
                if sequence not in self.voided:
                    not_finite.append(sequence)
                continue
            if result.logprobs[i] is not None:
                told[sequence] = result.logprobs[i]
            sequences.append(sequence)
            token_ids.append(result.token_ids[i])
        return sequences, token_ids, not_finite
