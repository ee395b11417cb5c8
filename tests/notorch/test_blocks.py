"""Blocks are counted: none is lost, none is freed twice, and cached prefixes go least recently used first."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sailfish.engine.kv.blocks import BlockPool

_N_BLOCKS = 6


class PoolMachine(RuleBasedStateMachine):
    """Drive a pool beside the simplest model of it: who holds what, and what was cached when."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(_N_BLOCKS, page_tokens=4)
        self.held: Counter[int] = Counter()
        self.cached: list[int] = []
        self.indexed: dict[int, bytes] = {}
        self.n_hashes = 0

    @rule()
    def allocate(self) -> None:
        """A free block comes first, then the one cached longest ago, then none."""
        n_plain = _N_BLOCKS - len(self.held) - len(self.cached)
        block_id = self.pool.allocate()
        if n_plain:
            assert block_id not in self.held and block_id not in self.cached
        elif self.cached:
            assert block_id == self.cached.pop(0)
            del self.indexed[block_id]
        else:
            assert block_id is None
            return
        assert block_id is not None
        self.held[block_id] = 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def index(self, data: Any) -> None:
        """A held block becomes findable."""
        block_id = data.draw(st.sampled_from(sorted(self.held)))
        if block_id not in self.indexed:
            self.n_hashes += 1
            self.indexed[block_id] = b"%d" % self.n_hashes
            self.pool.index.insert(self.indexed[block_id], block_id)

    @precondition(lambda self: self.held or self.cached)
    @rule(data=st.data())
    def reference(self, data: Any) -> None:
        """A held or cached block gets one more owner."""
        block_id = data.draw(st.sampled_from(sorted(self.held) + sorted(self.cached)))
        self.pool.reference(block_id)
        self.held[block_id] += 1
        if block_id in self.cached:
            self.cached.remove(block_id)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        """The last owner leaves the block cached if it is findable, else free."""
        block_id = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.release(block_id)
        self.held[block_id] -= 1
        if not self.held[block_id]:
            del self.held[block_id]
            if block_id in self.indexed:
                self.cached.append(block_id)

    @invariant()
    def counts_agree(self) -> None:
        """The pool's figures are the model's."""
        assert self.pool.n_used == len(self.held)
        assert self.pool.n_cached == len(self.cached)
        assert self.pool.n_free == _N_BLOCKS - len(self.held)
        assert {b: self.pool.n_refs(b) for b in range(_N_BLOCKS) if self.pool.n_refs(b)} == self.held
        for block_id, block_hash in self.indexed.items():
            assert self.pool.index.match([block_hash]) == [block_id]


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_releasing_a_block_twice_is_caught() -> None:
    """A double free is our own mistake, found at once."""
    pool = BlockPool(2, page_tokens=4)
    block_id = pool.allocate()
    assert block_id is not None
    pool.release(block_id)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(block_id)


def test_a_free_block_cannot_be_shared() -> None:
    """Only blocks that hold something can get another owner."""
    pool = BlockPool(2, page_tokens=4)
    with pytest.raises(AssertionError, match="holds nothing"):
        pool.reference(0)


@pytest.mark.parametrize(("n_tokens", "n_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_blocks_are_counted_in_whole_pages(n_tokens: int, n_blocks: int) -> None:
    """A block that is begun counts."""
    assert BlockPool(4, page_tokens=4).blocks_for(n_tokens) == n_blocks
