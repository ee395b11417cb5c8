"""Names the content of a KV block by a hash chain, and finds the blocks that hold a prefix."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

_DIGEST_BYTES = 32  # tenants share the index, so a collision must be out of reach


def root_hash(engine_digest: str, kv_dtype: str, tenant_salt: str, adapter: str) -> bytes:
    """Return the parent of every first block computed under exactly these circumstances."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for field in (engine_digest, kv_dtype, tenant_salt, adapter):
        data = field.encode()
        digest.update(struct.pack("<Q", len(data)))
        digest.update(data)
    return digest.digest()


def child_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the hash of a full block that follows `parent` and holds `token_ids`."""
    return blake2b(parent + array("I", token_ids).tobytes(), digest_size=_DIGEST_BYTES).digest()


class PrefixIndex:
    """Maps the hash of a full block to the one block that holds it."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._hash_of

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest indexed beginning of `hashes`."""
        found = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def insert(self, block_hash: bytes, block_id: int) -> None:
        """Index a block, unless another one with equal content is indexed already."""
        if block_hash not in self._block_of:
            assert block_id not in self._hash_of, f"block {block_id} is indexed under another hash"
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash

    def forget(self, block_id: int) -> None:
        """Drop a block; unknown ones are ignored."""
        block_hash = self._hash_of.pop(block_id, None)
        if block_hash is not None:
            del self._block_of[block_hash]
