"""Counts the references to every KV block; unreferenced blocks with a known prefix are kept until needed."""

from __future__ import annotations

from collections import OrderedDict

from sailfish.engine.kv.prefix import PrefixIndex


class BlockPool:
    """Blocks 0 .. n_blocks: free, cached (unreferenced but indexed), or referenced by sequences."""

    def __init__(self, n_blocks: int, page_tokens: int) -> None:
        self.n_blocks = n_blocks
        self.page_tokens = page_tokens
        self.index = PrefixIndex()
        self._n_refs = [0] * n_blocks
        self._free = list(range(n_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def n_free(self) -> int:
        """Blocks that `allocate` can still give, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def n_used(self) -> int:
        """Blocks that a sequence refers to."""
        return self.n_blocks - self.n_free

    @property
    def n_cached(self) -> int:
        """Unreferenced blocks that still hold a reusable prefix."""
        return len(self._cached)

    def blocks_for(self, n_tokens: int) -> int:
        """Return how many blocks hold `n_tokens`."""
        return -(-n_tokens // self.page_tokens)

    def n_refs(self, block_id: int) -> int:
        """Return how many references a block has."""
        return self._n_refs[block_id]

    def allocate(self) -> int | None:
        """Take a block with one reference, evicting the least recently used prefix if none is free."""
        if self._free:
            block_id = self._free.pop()
        elif self._cached:
            block_id, _ = self._cached.popitem(last=False)
            self.index.forget(block_id)
        else:
            return None
        self._n_refs[block_id] = 1
        return block_id

    def reference(self, block_id: int) -> None:
        """Add a reference to a block that is in use or cached."""
        if self._n_refs[block_id] == 0:
            assert block_id in self._cached, f"block {block_id} is free: it holds nothing to share"
            del self._cached[block_id]
        self._n_refs[block_id] += 1

    def release(self, block_id: int) -> None:
        """Drop a reference; the last one caches the block if it is indexed, else frees it."""
        assert self._n_refs[block_id] > 0, f"block {block_id} is released more often than referenced"
        self._n_refs[block_id] -= 1
        if self._n_refs[block_id] == 0:
            if block_id in self.index:
                self._cached[block_id] = None
            else:
                self._free.append(block_id)
