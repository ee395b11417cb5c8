"""schemathesis, an outside judge, finds nothing wrong between our description and our behaviour."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine, FakeTemplate
from serving import WAIT_S, Running

from sailfish.base.config import ServeConfig
from sailfish.engine.api import MAX_STOP_CHARS, MAX_STOP_STRINGS
from sailfish.serve.openapi import pattern_up_to

Start = Callable[..., Running]


@pytest.mark.slow
@pytest.mark.parametrize("has_template", [True, False])
def test_schemathesis_finds_nothing_in_positive_and_negative_mode(
    start: Start, has_template: bool, tmp_path: Path
) -> None:
    running = start(
        FakeEngine(template=FakeTemplate() if has_template else None),
        config=ServeConfig(api_keys="judge:judge-key"),
    )
    result = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{running.url}/openapi.json"),
            *("--checks=all", "--mode=all", "--max-examples=40", "--seed=7", "--continue-on-failure"),
            *("--header", "Authorization: Bearer judge-key", "--generation-database=none", "--no-color"),
        ],
        cwd=tmp_path,
        env={"PATH": "", "SCHEMATHESIS_HOOKS": "schema_hooks", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=10 * WAIT_S,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert re.search(r"\d{3,} generated, \d+ passed", result.stdout), result.stdout[-2000:]


def test_a_model_without_a_chat_template_does_not_offer_chat(start: Start) -> None:
    running = start(FakeEngine(template=None))
    document = httpx.get(running.url + "/openapi.json", timeout=WAIT_S).json()
    assert "/v1/completions" in document["paths"] and "/v1/chat/completions" not in document["paths"]


def test_the_limits_are_part_of_the_description(start: Start) -> None:
    document = httpx.get(start().url + "/openapi.json", timeout=WAIT_S).json()
    limits = document["info"]["x-limits"]
    assert limits["body_bytes"] == 8 * 2**20
    assert (limits["stop_strings"], limits["stop_chars"]) == (MAX_STOP_STRINGS, MAX_STOP_CHARS)


@pytest.mark.parametrize("last", [0, 5, 9, 10, 99, 257, 1000, 8191, 20_305])
def test_the_pattern_of_token_ids_matches_the_vocabulary_and_no_more(last: int) -> None:
    pattern = re.compile(pattern_up_to(last))
    assert all(pattern.fullmatch(str(n)) for n in range(last + 1))
    assert not any(pattern.fullmatch(str(n)) for n in range(last + 1, last + 2000))
    assert not any(pattern.fullmatch(text) for text in ("", "-1", "01", "1.0", "a"))
