"""Refused early, in one line that names the figures and says when to come back."""

from __future__ import annotations

import pytest
from fake_runner import Rig, sampling

from sailfish.base.errors import ContextTooLong, Overloaded, RequestError
from sailfish.engine.admission import Forecast
from sailfish.engine.limits import SchedulerLimits


def rig_of(**fields: int) -> Rig:
    """Return a small engine with some limits changed."""
    small = {
        "max_sequences": 1,
        "step_tokens": 10,
        "context_tokens": 100,
        "max_queue": 3,
        "page_tokens": 4,
        "n_blocks": 64,
        "lag": 0,
    }
    return Rig(SchedulerLimits(**(small | fields)))  # type: ignore[arg-type]


def test_an_empty_prompt_is_refused() -> None:
    """There would be no logits to draw from."""
    rig = rig_of()
    error = rig.refused[rig.submit([])]
    assert isinstance(error, RequestError) and error.param == "prompt"


def test_max_tokens_of_nothing_is_refused() -> None:
    """An answer has at least one token."""
    rig = rig_of()
    error = rig.refused[rig.submit([1], max_tokens=0)]
    assert isinstance(error, RequestError) and error.param == "max_tokens"


@pytest.mark.parametrize(
    ("n_prompt", "max_tokens", "param"),
    [
        (99, 1, None),
        (100, 1, "prompt"),
        (100, None, "prompt"),
        (99, None, None),
        (60, 40, None),
        (60, 41, "max_tokens"),
    ],
)
def test_prompt_and_answer_must_fit_the_context(
    n_prompt: int, max_tokens: int | None, param: str | None
) -> None:
    """One token more than the context is refused with both figures."""
    rig = rig_of()
    error = rig.refused.get(rig.submit([1] * n_prompt, max_tokens=max_tokens))
    if param is None:
        assert error is None
        return
    assert isinstance(error, ContextTooLong)
    assert (error.code, error.param, error.http_status) == ("context_length_exceeded", param, 400)
    assert str(n_prompt) in str(error) and "100" in str(error)


def test_a_full_queue_refuses_with_a_time_to_retry() -> None:
    """One runs and three wait; nothing of it is lost, and there is room again once the queue moves."""
    rig = rig_of()
    for _ in range(5):
        rig.submit([1, 2, 3])
    (error,) = rig.refused.values()
    assert isinstance(error, Overloaded)
    assert (error.retry_after_s, error.http_status) == (1.0, 503)
    assert "3 requests are waiting and the queue holds 3" in error.message
    assert rig.scheduler.stats.refused == {"overloaded": 1}
    rig.step()
    while rig.scheduler.n_waiting == 3:
        rig.step()
    rig.submit([1, 2, 3])
    rig.run()
    assert len(rig.refused) == 1 and rig.scheduler.stats.finished == {"length": 5}


def test_the_time_to_retry_follows_the_backlog() -> None:
    """At ten tokens a second, 300 waiting tokens take half a minute."""
    rig = rig_of(max_queue=4)
    rig.submit([1] * 90, max_tokens=1)
    rig.run()
    for token_id in range(2, 7):
        rig.submit([token_id] * 60, max_tokens=1)
    error = rig.refused[rig.submit([1])]
    assert error.retry_after_s == pytest.approx(30.0, rel=0.15)


def test_an_engine_that_stops_takes_nothing_new() -> None:
    """What was accepted before is finished."""
    rig = rig_of()
    accepted = rig.submit([1, 2, 3])
    rig.scheduler.drain()
    error = rig.refused[rig.submit([1])]
    assert isinstance(error, Overloaded) and error.retry_after_s
    rig.run()
    assert rig.answers[accepted].reason == "length"
    assert rig.scheduler.snapshot().draining


def test_a_deadline_is_believed_until_something_was_measured() -> None:
    """Without a measurement nobody is refused on a guess."""
    rig = rig_of()
    rig.submit([1] * 90, deadline_s=rig.now_s + 0.001)
    assert not rig.refused


def test_a_deadline_that_cannot_be_met_is_refused() -> None:
    """At ten tokens a second, 90 tokens take nine seconds: eight are refused, ten are not."""
    rig = rig_of()
    rig.submit([1] * 90, max_tokens=1)
    rig.run()
    late = rig.submit([2] * 90, max_tokens=1, deadline_s=rig.now_s + 8.0)
    fine = rig.submit([2] * 90, max_tokens=1, deadline_s=rig.now_s + 10.0)
    error = rig.refused[late]
    assert isinstance(error, Overloaded) and "8.00 s" in error.message and error.retry_after_s
    rig.run()
    assert rig.answers[fine].reason == "length"


def test_only_tokens_that_must_come_count_against_a_deadline() -> None:
    """An answer may end early: max_tokens does not count, min_tokens does."""
    rig = rig_of()
    rig.submit([1] * 30, max_tokens=30)
    rig.run()
    short = rig.submit([2] * 10, max_tokens=90, deadline_s=rig.now_s + 10.0)
    assert short in rig.answers
    rig.abort(short)
    wanted = sampling(min_tokens=60)
    assert rig.submit([2] * 10, max_tokens=90, sampling=wanted, deadline_s=rig.now_s + 10.0) in rig.refused


def test_the_forecast_follows_what_is_measured_now() -> None:
    """Old measurements fade; steps that only decode say nothing of prompts."""
    forecast = Forecast()
    assert forecast.compute_s(100) is None and forecast.decode_s(5) == 0.0
    for _ in range(200):
        forecast.observe(100, 4, 1.0)
    for _ in range(200):
        forecast.observe(100, 4, 0.1)
    for _ in range(200):
        forecast.observe(4, 4, 0.02)
    assert forecast.compute_s(1000) == pytest.approx(1.0, rel=0.05)
    assert forecast.decode_s(10) == pytest.approx(0.2, rel=0.05)
