"""The packaged model is as good as its card says, measured through the engine's own prompt scores."""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path
from typing import Any

import pytest
from local_engine import LocalEngine, greedy

from sailfish.base.config import EngineConfig
from sailfish.build.builder import build_engine
from sailfish.checkpoint.tokenizer import Tokenizer
from sailfish.data import demo_model

BOOKS = Path(__file__).parents[2].parent / "shared" / "data" / "books-valid.jsonl.xz"
N_WINDOWS, WINDOW_TOKENS = 60, 1024


@pytest.fixture(scope="module")
def book_ids() -> list[int]:
    """Return the tokens of the windows."""
    if not BOOKS.exists():
        pytest.skip("the validation books are not here")
    with lzma.open(BOOKS, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(8), strict=False)]
    text = "\n\n".join(texts)[: 6 * N_WINDOWS * WINDOW_TOKENS]  # a token is 3 to 4 characters
    ids = Tokenizer.load(demo_model()).encode(text, special=False, add_special=False)
    assert len(ids) >= N_WINDOWS * WINDOW_TOKENS
    return ids


def _perplexity(engine_dir: Path, config: EngineConfig, ids: list[int], n_windows: int) -> float:
    if not engine_dir.exists():
        build_engine(demo_model(), engine_dir, config=config, target="cpu")
    engine = LocalEngine(engine_dir, config)
    for key in range(n_windows):
        window = ids[key * WINDOW_TOKENS : (key + 1) * WINDOW_TOKENS]
        engine.submit(key, window, greedy(8192, prompt_logprobs=0), 1)
    heard = engine.run()
    scores = [entry.logprob for key in heard for entry in heard[key].prompt_logprobs or []]
    assert len(scores) == n_windows * (WINDOW_TOKENS - 1)
    return math.exp(-sum(scores) / len(scores))


@pytest.fixture(scope="module")
def exact(book_ids: list[int], tmp_path_factory: pytest.TempPathFactory) -> float:
    """Return the perplexity of the first windows, nothing rounded."""
    return _perplexity(
        tmp_path_factory.mktemp("exact") / "engine", EngineConfig(dtype="float32"), book_ids, 4
    )


@pytest.mark.slow
def test_books_4m_has_the_perplexity_of_its_card(book_ids: list[int], tmp_path: Path) -> None:
    perplexity = _perplexity(tmp_path / "engine", EngineConfig(dtype="float32"), book_ids, N_WINDOWS)
    assert perplexity == pytest.approx(39.3, abs=0.05)


@pytest.mark.slow
def test_a_cache_in_8_bits_costs_less_than_half_a_percent_of_perplexity(
    book_ids: list[int], exact: float, tmp_path: Path
) -> None:
    rounded = [
        _perplexity(tmp_path / kv_dtype, EngineConfig(dtype="float32", kv_dtype=kv_dtype), book_ids, 4)
        for kv_dtype in ("int8", "fp8")
    ]
    assert rounded == pytest.approx([exact, exact], rel=0.005)
    assert exact not in rounded, "the cache was not in 8 bits"


@pytest.mark.slow
@pytest.mark.usefixtures("quantises_in_this_process")
@pytest.mark.parametrize(
    ("formats", "most"),
    [
        ({"weights": "int4"}, 1.065),
        ({"weights": "int4", "weight_group": 32}, 1.055),
        ({"weights": "int8", "head": "int8", "embedding": "int8"}, 1.006),
        ({"weights": "fp8", "head": "fp8"}, 1.012),
    ],
    ids=str,
)
def test_quantised_weights_cost_no_more_perplexity_than_the_documentation_says(
    formats: dict[str, Any], most: float, book_ids: list[int], exact: float, tmp_path: Path
) -> None:
    rounded = _perplexity(tmp_path / "rounded", EngineConfig(dtype="float32", **formats), book_ids, 4)
    assert 1.0005 * exact < rounded < most * exact
