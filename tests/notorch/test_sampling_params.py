"""Parameters of one request: what is taken, and what is refused in one line naming the field."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sailfish.base.errors import RequestError
from sailfish.engine.api import Options, SamplingParams, token_ids


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 5.5),
        ("max_tokens", "5"),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("seed", 1.5),
        ("seed", 2**63),
        ("temperature", math.nan),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_k", -2),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("logprobs", 1.0),
        ("logprobs", 21),
        ("n", 0),
        ("n", 10**9),
        ("stop", 7),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
        ("stop_token_ids", (1.5,)),
        ("stop_token_ids", (100,)),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", {100: 1.0}),
    ],
)
def test_a_wrong_value_is_refused(field: str, value: Any) -> None:
    with pytest.raises(RequestError):
        SamplingParams(**{field: value}).checked(vocab_size=100)


def test_one_stop_string_is_one_stop_string() -> None:
    assert SamplingParams(stop="the").checked(100).stop == ("the",)
    assert SamplingParams(stop=("a", "b")).checked(100).stop == ("a", "b")


def test_whole_parameters_come_back_as_they_were() -> None:
    params = SamplingParams(temperature=1, top_k=5, logit_bias={3: 1.5}, stop=("x",), n=2, seed=-1)
    assert params.checked(100) == params


@pytest.mark.parametrize(
    "options",
    [
        Options(priority=2**70),
        Options(priority=True),
        Options(priority=1.5),  # type: ignore[arg-type]
        Options(deadline_s=math.nan),
        Options(deadline_s=0.0),
        Options(deadline_s="5"),  # type: ignore[arg-type]
        Options(tenant=5),  # type: ignore[arg-type]
        Options(tenant="\ud800"),
        {},
        None,
    ],
)
def test_a_wrong_option_is_refused(options: Any) -> None:
    with pytest.raises(RequestError):
        Options.checked(options)


@pytest.mark.parametrize("prompt", [b"It", {}, [1.5], ["a"], [100], [-1]])
def test_what_is_no_token_id_is_refused(prompt: Any) -> None:
    with pytest.raises(RequestError):
        token_ids(prompt, vocab_size=100)
