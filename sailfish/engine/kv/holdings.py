"""Gives sequences the blocks they live in: found by prefix, fresh, one more, and back again."""

from __future__ import annotations

from collections.abc import Iterator

from sailfish.engine.kv.blocks import BlockPool
from sailfish.engine.kv.prefix import root_hash
from sailfish.engine.sequence import Sequence


class Holdings:
    """The blocks of all running sequences, over one pool."""

    def __init__(self, pool: BlockPool, *, engine_digest: str, kv_dtype: str, prefix_cache: bool) -> None:
        self.pool = pool
        self._identity = (engine_digest, kv_dtype)
        self._prefix_cache = prefix_cache

    def match(self, sequence: Sequence) -> list[int]:
        """Return the cached blocks a sequence can begin with.

        At least one position is left to compute, and all of them if the prompt's logprobs are wanted.
        """
        if not self._prefix_cache or sequence.prompt_scores is not None:
            return []
        n_blocks = (len(sequence.token_ids) - 1) // self.pool.page_tokens
        return self.pool.index.match(self._hashes(sequence, 0, n_blocks))

    def take(self, sequence: Sequence, matched: list[int], reserve_blocks: int) -> bool:
        """Give a sequence `matched` and fresh blocks for all its known tokens.

        False, and nothing changed, if fewer than `reserve_blocks` would be left.
        """
        pool = self.pool
        for block_id in matched:
            pool.reference(block_id)
        n_new = pool.blocks_for(len(sequence.token_ids)) - len(matched)
        if n_new + reserve_blocks > pool.n_free:
            self._release(matched)
            return False
        sequence.block_ids = list(matched)
        for _ in range(n_new):
            self.grow(sequence)
        sequence.n_indexed = len(matched)
        sequence.n_computed = len(matched) * pool.page_tokens
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Append one block; False if there is none."""
        block_id = self.pool.allocate()
        if block_id is None:
            return False
        sequence.block_ids.append(block_id)
        return True

    def index(self, sequence: Sequence, n_blocks: int) -> None:
        """Let others find the first `n_blocks` blocks, now that they are full of known tokens."""
        if self._prefix_cache:
            block_ids = sequence.block_ids[sequence.n_indexed : n_blocks]
            hashes = self._hashes(sequence, sequence.n_indexed, n_blocks)
            for block_hash, block_id in zip(hashes, block_ids, strict=True):
                self.pool.index.insert(block_hash, block_id)
        sequence.n_indexed = n_blocks

    def distrust(self, sequence: Sequence) -> None:
        """Let nobody find the sequence's blocks any more, because what they hold may be bad."""
        for block_id in sequence.block_ids:
            self.pool.index.forget(block_id)

    def give_back(self, sequence: Sequence) -> None:
        """Release all blocks of a sequence."""
        self._release(sequence.block_ids)
        sequence.block_ids = []

    def _release(self, block_ids: list[int]) -> None:
        for block_id in reversed(block_ids):  # so that a prefix's tail is evicted first
            self.pool.release(block_id)

    def _hashes(self, sequence: Sequence, start: int, end: int) -> Iterator[bytes]:
        if sequence.cache_root is None:
            sequence.cache_root = root_hash(*self._identity, sequence.tenant, sequence.adapter)
        return sequence.hashes(sequence.cache_root, start, end, self.pool.page_tokens)
