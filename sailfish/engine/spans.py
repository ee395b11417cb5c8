"""What attention of captured steps with prompts reads anew in every step, at one place of the device."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from sailfish.engine.packing import Batch, Words
from sailfish.engine.transfer import WordsUp
from sailfish.kernels.cuda.attention import CapturedSpan
from sailfish.kernels.cuda.prefill_attention import Work, tile_rows, work_words

_Words = TypeVar("_Words", Tensor, Words)


class CapturedSpans:
    """Spans over a table's rows, of any number of tokens, that share their words on the device.

    Those are the work of prefill attention, then by run its row, its length, its length again if it is one
    query, and its first query.
    """

    def __init__(
        self, block_table_RW: Tensor, *, most_tokens: int, context_tokens: int, head_dim: int
    ) -> None:
        """Take the table, whose last row is nobody's, and the most tokens of a captured step."""
        self._block_table_RW = block_table_RW
        self._context_tokens = context_tokens
        self._tile_rows = tile_rows(head_dim)
        self._most_runs = most_runs = min(len(block_table_RW) - 1, most_tokens)
        self._runs_at = 1 + self._most_tiles(most_tokens)
        self._words = WordsUp(self._runs_at + 4 * most_runs + 1, block_table_RW.device)

    def span(self, n_tokens: int) -> CapturedSpan:
        """Return the span to capture a step of `n_tokens` tokens with."""
        words = self._words.device_words
        row_B, kv_len_B, single_B, query_start_B1 = _by_run(words[self._runs_at :], self._most_runs)
        n_single = min(n_tokens, self._most_runs)
        return CapturedSpan(
            block_table_RW=self._block_table_RW,
            row_B=row_B,
            query_start=(0,) * (n_single + 1),
            kv_len=(self._context_tokens,) * n_single,
            kv_len_B=kv_len_B,
            query_start_B1=query_start_B1,
            n_single=n_single,
            single_kv_len_B=single_B,
            work=Work(words, self._most_tiles(n_tokens)),
        )

    def send(self, batch: Batch, kv_len: tuple[int, ...], query_start: tuple[int, ...]) -> None:
        """Send the span of a step; who replays it need not wait."""
        words = self._words.begin()
        n, n_single = len(kv_len), batch.n_single
        work = work_words(query_start, kv_len, self._tile_rows, n_single)
        words[: len(work)] = work
        row_B, kv_len_B, single_B, query_start_B1 = _by_run(words[self._runs_at :], self._most_runs)
        row_B[:n], kv_len_B[:n], query_start_B1[: n + 1] = batch.row_B, kv_len, query_start
        single_B[:n_single], single_B[n_single:] = kv_len[:n_single], 0
        self._words.send(0, len(words))

    def _most_tiles(self, n_tokens: int) -> int:
        return n_tokens // self._tile_rows + min(n_tokens, self._most_runs)


def _by_run(words: _Words, n: int) -> tuple[_Words, _Words, _Words, _Words]:
    return words[:n], words[n : 2 * n], words[2 * n : 3 * n], words[3 * n : 4 * n + 1]
