"""Packs small codes into int32 words, lowest bits first, and takes them out again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WORD_BITS = 32


def n_words(n_codes: int, bits: int, *, dense: bool = True) -> int:
    """Return how many words hold so many codes; where not dense, no code lies across two words."""
    return -(-n_codes * bits // WORD_BITS) if dense else -(-n_codes // (WORD_BITS // bits))


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Return [..., ceil(N * bits / 32)] int32 of [..., N] codes below 2^bits; spare bits are 0."""
    *leading, n_codes = codes.shape
    padded = n_words(n_codes, bits) * WORD_BITS // 8
    if 8 % bits:
        n_bits = n_codes * bits
        stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
        raw = np.packbits(stream.reshape(*leading, n_bits), axis=-1, bitorder="little")
    else:
        per_byte = 8 // bits
        n_bytes = -(-n_codes // per_byte)
        whole = np.zeros((*leading, n_bytes * per_byte), np.uint8)
        whole[..., :n_codes] = codes
        raw = np.zeros((*leading, n_bytes), np.uint8)
        for place in range(per_byte):  # a new last axis of two codes would be 10 times as slow
            raw |= whole[..., place::per_byte] << np.uint8(place * bits)
    data = np.zeros((*leading, padded), np.uint8)
    data[..., : raw.shape[-1]] = raw
    return data.view("<i4")


def unpack(words: NDArray[np.int32], bits: int, n_codes: int, *, dense: bool = True) -> NDArray[np.uint8]:
    """Return the first `n_codes` codes of the words along the last axis, uint8."""
    *leading, _ = words.shape
    raw = np.ascontiguousarray(words, dtype="<i4")
    if not dense:
        shifts = np.arange(0, WORD_BITS - bits + 1, bits, dtype=np.int32)
        codes = (raw[..., None] >> shifts & ((1 << bits) - 1)).astype(np.uint8)
        return np.ascontiguousarray(codes.reshape(*leading, -1)[..., :n_codes])
    if 8 % bits:
        stream = np.unpackbits(raw.view(np.uint8), axis=-1, count=n_codes * bits, bitorder="little")
        return np.packbits(stream.reshape(*leading, n_codes, bits), axis=-1, bitorder="little")[..., 0]
    per_byte = 8 // bits
    data = raw.view(np.uint8)
    out = np.empty((*leading, data.shape[-1] * per_byte), np.uint8)
    for place in range(per_byte):
        out[..., place::per_byte] = data >> np.uint8(place * bits) & np.uint8((1 << bits) - 1)
    return np.ascontiguousarray(out[..., :n_codes])
