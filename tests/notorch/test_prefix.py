"""A block's hash names its whole past, and the index finds the longest prefix that is still there."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from fake_runner import Rig, sampling
from hypothesis import given
from hypothesis import strategies as st

from sailfish.engine.kv.prefix import PrefixIndex, child_hash, root_hash
from sailfish.engine.limits import SchedulerLimits
from sailfish.engine.sequence import Sequence

_TOKENS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5)
_TEXT = st.text(max_size=3)


@given(a=st.tuples(_TEXT, _TEXT, _TEXT, _TEXT), b=st.tuples(_TEXT, _TEXT, _TEXT, _TEXT))
def test_roots_are_equal_only_when_every_field_is(
    a: tuple[str, str, str, str], b: tuple[str, str, str, str]
) -> None:
    """Moving a letter from one field to the next makes another root."""
    assert (root_hash(*a) == root_hash(*b)) == (a == b)


@given(a=_TOKENS, b=_TOKENS)
def test_children_are_equal_only_when_parent_and_tokens_are(a: list[int], b: list[int]) -> None:
    """The same tokens after another past are another block."""
    one, two = root_hash("e", "bfloat16", "", ""), root_hash("e", "bfloat16", "tenant", "")
    assert (child_hash(one, a) == child_hash(one, b)) == (a == b)
    assert child_hash(one, a) != child_hash(two, a)


def test_hashes_are_the_same_in_every_process() -> None:
    """Nothing in them depends on Python's own hash seed."""
    code = (
        "from sailfish.engine.kv.prefix import *;"
        "print(child_hash(root_hash('e', 'float32', 's', ''), [1, 2, 3]).hex())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_a_match_ends_at_the_first_missing_block() -> None:
    """What follows a gap cannot be used."""
    index = PrefixIndex()
    for block_id, name in enumerate([b"a", b"b", b"d"]):
        index.insert(name, block_id)
    assert index.match([b"a", b"b", b"c", b"d"]) == [0, 1]
    index.forget(0)
    assert index.match([b"a", b"b"]) == []
    assert index.match([b"b"]) == [1]


def test_the_second_block_of_equal_content_stays_out_of_the_index() -> None:
    """One block per content; the copy is freed when its owner ends."""
    index = PrefixIndex()
    index.insert(b"a", 0)
    index.insert(b"a", 1)
    index.forget(1)
    assert index.match([b"a"]) == [0] and len(index) == 1


def _limits(**fields: int | bool) -> SchedulerLimits:
    given_fields = {
        "max_sequences": 4,
        "step_tokens": 32,
        "context_tokens": 32,
        "max_queue": 8,
        "page_tokens": 4,
        "n_blocks": 16,
        "lag": 0,
    }
    return SchedulerLimits(**(given_fields | fields))  # type: ignore[arg-type]


def _cached(rig: Rig, prompt: list[int], **fields: object) -> int:
    """Run one sequence to its end and return how many of its tokens came from the cache."""
    key = rig.submit(prompt, **fields)
    rig.run()
    rig.check_answer(rig.answers[key])
    return rig.answers[key].sequence.n_cached


@pytest.mark.parametrize(("n_prompt", "n_cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_at_least_one_position_is_computed(n_prompt: int, n_cached: int) -> None:
    """A prompt that is cached whole still needs the logits of its last token."""
    rig = Rig(_limits())
    prompt = list(range(n_prompt))
    assert _cached(rig, prompt) == 0
    assert _cached(rig, prompt) == n_cached


def test_an_answer_is_a_prefix_too() -> None:
    """The next turn of a conversation finds the blocks of the last answer."""
    rig = Rig(_limits())
    key = rig.submit([1, 2, 3], max_tokens=9)
    rig.run()
    answer = rig.answers[key]
    assert _cached(rig, [1, 2, 3, *answer.tokens, 5, 6]) == 8  # the last token drawn was never computed


def test_tenants_and_adapters_share_nothing() -> None:
    """Equal prompts of others are not found, equal prompts of one's own are."""
    rig = Rig(_limits())
    prompt = list(range(9))
    assert _cached(rig, prompt, tenant="a", sampling=sampling(tenant=1)) == 0
    assert _cached(rig, prompt, tenant="b", sampling=sampling(tenant=2)) == 0
    assert _cached(rig, prompt, tenant="a", adapter="x", sampling=sampling(tenant=3)) == 0
    assert _cached(rig, prompt, tenant="a", sampling=sampling(tenant=1)) == 8


def test_prompt_logprobs_compute_every_position() -> None:
    """A position that is not computed has no logits; others still profit from the blocks."""
    rig = Rig(_limits())
    scored = sampling(prompt_logprobs=0)
    prompt = list(range(9))
    assert _cached(rig, prompt, sampling=scored) == 0
    assert _cached(rig, prompt, sampling=scored) == 0
    assert _cached(rig, prompt) == 8


def test_the_cache_can_be_off() -> None:
    """Then nothing is found, queried or kept."""
    rig = Rig(_limits(prefix_cache=False))
    assert _cached(rig, list(range(9))) == _cached(rig, list(range(9))) == 0
    stats = rig.scheduler.snapshot()
    assert (stats.blocks_cached, stats.prefix_query_tokens) == (0, 0)


def test_a_prefix_is_evicted_from_its_tail() -> None:
    """What many share, the beginning, is kept longest."""
    rig = Rig(_limits(n_blocks=8, context_tokens=32))
    prompt = list(range(17))
    _cached(rig, prompt, max_tokens=1)
    _cached(rig, [9] * 21, max_tokens=1)  # needs 6 of 8 blocks, of which 4 hold the first prefix
    assert _cached(rig, prompt, max_tokens=1) == 8


def test_the_prefix_used_last_is_evicted_last() -> None:
    """A hit makes a prefix young again."""
    rig = Rig(_limits(n_blocks=8, context_tokens=32))
    a, b = [1] * 9, [2] * 9
    _cached(rig, a, max_tokens=1)
    _cached(rig, b, max_tokens=1)
    assert _cached(rig, a, max_tokens=1) == 8
    _cached(rig, [3] * 20, max_tokens=1)  # evicts one block beyond the four that are free
    assert _cached(rig, a, max_tokens=1) == 8
    assert _cached(rig, b, max_tokens=1) < 8


def test_prompts_that_arrive_together_find_what_the_first_one_computes() -> None:
    """A long shared prompt is computed once, though the second request came before it was done."""
    rig = Rig(_limits(step_tokens=8, context_tokens=32))
    prompt = list(range(24))
    first, second = rig.submit([*prompt, 1]), rig.submit([*prompt, 2])
    rig.run()
    assert rig.answers[first].sequence.n_cached == 0
    assert rig.answers[second].sequence.n_cached >= 16
    rig.check_answer(rig.answers[second])


def test_blocks_of_bad_numbers_are_found_by_nobody() -> None:
    """A chunk that went bad is indexed before anybody can know; the end of its sequence takes it back."""
    rig = Rig(_limits(step_tokens=8))
    prompt = list(range(17))
    rig.submit(prompt)
    rig.step()
    rig.step()
    assert len(rig.scheduler.pool.index) > 0
    rig.step(fault="nan")
    assert rig.answers[0, 0].code == "nan_logits"
    assert len(rig.scheduler.pool.index) == 0
    assert _cached(rig, prompt) == 0


def test_a_look_up_hashes_no_further_than_the_first_miss() -> None:
    """A long prompt nobody has seen costs one hash, however often it is looked up."""
    rig = Rig(_limits(max_sequences=1))
    rig.submit([1, 2, 3], max_tokens=20)
    key = rig.submit(list(range(30)), max_tokens=1)
    sequence = rig.answers[key].sequence
    for _ in range(3):
        assert rig.scheduler._holdings.match(sequence) == []
        rig.step()
    assert len(sequence.block_hashes) == 1


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20))
def test_the_chain_is_the_same_however_it_is_extended(token_ids: list[int]) -> None:
    """Hashing block by block or all at once names the same blocks."""
    root = root_hash("e", "float32", "", "")
    n_blocks = len(token_ids) // 2
    steps = [
        Sequence(key=(0, 0), prompt_ids=token_ids, sampling=sampling(), max_tokens=1, arrival_s=0.0)
        for _ in range(2)
    ]
    in_steps = [next(steps[0].hashes(root, i, i + 1, 2)) for i in range(n_blocks)]
    hashes = list(steps[1].hashes(root, 0, n_blocks, 2))
    assert in_steps == hashes
    for i, (before, after) in enumerate(pairwise([root, *hashes])):
        assert after == child_hash(before, token_ids[2 * i : 2 * i + 2])
