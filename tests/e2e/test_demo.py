"""The demo does what it says: builds, serves, answers through the openai client, and ends cleanly."""

from __future__ import annotations

from pathlib import Path

import pytest

from sailfish.bench import demo
from sailfish.build.cache import find_or_build
from sailfish.data import DEMO_MODEL_NAME


@pytest.mark.slow
def test_the_demo_streams_an_answer_measures_it_and_ends_cleanly() -> None:
    written: list[str] = []
    figures = demo.run(Path(find_or_build(DEMO_MODEL_NAME)), written.append)
    text = "".join(written)
    assert text.startswith(demo.PROMPT)
    assert len(text) > len(demo.PROMPT) + demo.ANSWER_TOKENS
    assert len(written) > 10, "the answer came in one piece"
    assert figures.exit_code == 0
    assert figures.speed_up > 1
    assert min(figures.ttft_ms, figures.tokens_per_s, figures.ready_s) > 0
