"""The check before the parser agrees with a brute-force reading of every document."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sailfish.serve.errors import Refusal
from sailfish.serve.gateway.limits import LIMITS
from sailfish.serve.gateway.strict_json import parse_object

TRICKY = st.text(st.sampled_from('[]{},"\\é😀 \n'), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TRICKY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TRICKY, inner, max_size=3),
    max_leaves=12,
)


def depth(value: Any) -> int:
    """Return how deep arrays and objects nest."""
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


def counts(value: Any) -> tuple[int, int]:
    """Return the number of containers and of commas."""
    if not isinstance(value, dict | list):
        return 0, 0
    inner = [counts(item) for item in (value.values() if isinstance(value, dict) else value)]
    return 1 + sum(c for c, _ in inner), max(len(value) - 1, 0) + sum(c for _, c in inner)


@given(st.dictionaries(TRICKY, VALUES, max_size=3), st.integers(1, 5), st.booleans(), st.integers(0, 6))
def test_a_document_is_taken_exactly_when_it_is_within_the_limits(
    document: dict[str, Any], max_depth: int, ascii_only: bool, most: int
) -> None:
    body = bytearray(json.dumps(document, ensure_ascii=ascii_only).encode())
    limits = replace(LIMITS, json_depth=max_depth)
    if depth(document) <= max_depth:
        assert parse_object(body, limits) == document
    else:
        with pytest.raises(Refusal):
            parse_object(body, limits)
    containers, commas = counts(document)
    strict = replace(LIMITS, json_depth=0, json_containers=most, json_commas=most)
    with pytest.raises(Refusal, match="deeper" if max(containers, commas) <= most else "more than"):
        parse_object(body, strict)
