"""The 32-bit words in which a step's differences travel to the device, in one copy. No torch.

    0                          appended blocks (n)
    1                          runs: row, start, query; then one record that holds the tokens of the step
    1 + 3 * (runs + 1)         samples: the run that each one ends
    ... + samples              appended: row, index in the row's block list, block
    ... + 3 * n                rows that begin: records of START_FIELDS, then what they point to

A run's queries are query .. query of the next record; they are at positions start, start + 1, ... of its
row. A run that only pads a captured step is of a row that nobody else has, and all its positions are below 0:
it starts at minus its number of tokens, which makes the row 0 long.
Floating-point numbers travel as their bits.
"""

from __future__ import annotations

from dataclasses import dataclass

RUN_FIELDS = ("row", "start", "query")
START_FIELDS = (
    *("row", "n_prompt", "n_tokens", "tokens_at", "n_blocks", "blocks_at"),
    *("n_barred", "barred_at", "n_bias", "bias_at"),
    *("top_k", "min_length", "seed_low", "seed_high"),
    *("temperature", "top_p", "min_p", "repetition", "presence", "frequency"),
)
"""Places are counted from the first word. At bias_at lie the ids, then the biases."""
RUN_WORDS = len(RUN_FIELDS)
START_WORDS = len(START_FIELDS)
APPENDED_WORDS = 3
RUNS_AT = 1
MAX_BARRED = 80
"""Token ids that a row may bar before its shortest length: stop tokens, and the model's ends of text."""
MAX_BIAS = 1024
"""Token ids whose logits a row may bias."""
_COMMON_START_WORDS = 1 << 16
"""Room for the rows that begin in most steps, so that one copy takes them all."""


@dataclass(frozen=True, slots=True)
class StepLayout:
    """How many of what a step's words hold."""

    n_runs: int
    n_tokens: int
    n_samples: int
    is_decode: bool
    """Every run is one token and samples: there are no words of samples."""

    @property
    def samples_at(self) -> int:
        """First word of the samples."""
        return RUNS_AT + RUN_WORDS * (self.n_runs + 1)

    @property
    def appended_at(self) -> int:
        """First word of the appended blocks."""
        return self.samples_at + (0 if self.is_decode else self.n_samples)

    @classmethod
    def decode(cls, n_runs: int) -> StepLayout:
        """Return the layout of a step in which each run draws after one token."""
        return cls(n_runs, n_runs, n_runs, True)


def max_run_words(max_sequences: int) -> int:
    """Return the most words before the rows that begin: of all runs, one that pads, and the last record."""
    return RUNS_AT + RUN_WORDS * (max_sequences + 2) + (1 + APPENDED_WORDS) * max_sequences


def max_words(*, max_sequences: int, context_tokens: int, blocks_per_sequence: int) -> int:
    """Return the words for any step's runs and at least one row that begins, however long it is."""
    one_start = START_WORDS + context_tokens + blocks_per_sequence + MAX_BARRED + 2 * MAX_BIAS
    return max_run_words(max_sequences) + max(one_start, _COMMON_START_WORDS)
