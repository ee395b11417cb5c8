"""Counts what happens to sequences: the figures that operators and clients see."""

from __future__ import annotations

from sailfish.engine.api import EngineStats
from sailfish.engine.sequence import Sequence
from sailfish.engine.wire import Finish


class Ledger:
    """Writes the counters and histograms of `stats` that concern sequences and steps."""

    def __init__(self, n_blocks: int) -> None:
        self.stats = EngineStats(blocks_total=n_blocks)

    def refuse(self, code: str) -> None:
        """Count a sequence that was not accepted."""
        self.stats.refused[code] = self.stats.refused.get(code, 0) + 1

    def plan(self, n_tokens: int) -> None:
        """Count a step."""
        self.stats.steps += 1
        self.stats.step_tokens.observe(n_tokens)

    def start(self, sequence: Sequence, now_s: float, *, prefix_cache: bool) -> None:
        """Note that a sequence leaves the queue; later starts, after a preemption, do not count."""
        if sequence.scheduled_s is not None:
            return
        sequence.scheduled_s = now_s
        sequence.n_cached = sequence.n_computed
        self.stats.queue_s.observe(now_s - sequence.arrival_s)
        self.stats.prompt_tokens += sequence.n_prompt
        self.stats.prefix_hit_tokens += sequence.n_cached
        if prefix_cache:
            self.stats.prefix_query_tokens += sequence.n_prompt

    def draw(self, sequences: list[Sequence], now_s: float) -> None:
        """Count one new token for each of the sequences."""
        self.stats.generated_tokens += len(sequences)
        gaps: dict[float, int] = {}
        usual_s = sequences[0].last_token_s if sequences else None
        n_usual = 0  # nearly all of them had their last token in the same step
        for sequence in sequences:
            last_s = sequence.last_token_s
            sequence.last_token_s = now_s
            if last_s is not None:
                if last_s == usual_s:
                    n_usual += 1
                else:
                    gaps[last_s] = gaps.get(last_s, 0) + 1
                continue
            sequence.first_token_s = now_s
            self.stats.time_to_first_token_s.observe(now_s - sequence.arrival_s)
            if sequence.scheduled_s is not None:
                self.stats.prefill_s.observe(now_s - sequence.scheduled_s)
        if usual_s is not None:
            gaps[usual_s] = n_usual
        for last_s, count in gaps.items():
            self.stats.inter_token_s.observe(now_s - last_s, count)

    def end(self, sequence: Sequence, finish: Finish, now_s: float) -> None:
        """Count the end of a sequence; only whole answers have a latency."""
        self.stats.finished[finish.reason] = self.stats.finished.get(finish.reason, 0) + 1
        if not finish.code and sequence.first_token_s is not None:
            self.stats.end_to_end_s.observe(now_s - sequence.arrival_s)
            decode_s = now_s - sequence.first_token_s
            self.stats.decode_s.observe(decode_s)
            if sequence.n_output > 1:
                self.stats.time_per_output_token_s.observe(decode_s / (sequence.n_output - 1))
