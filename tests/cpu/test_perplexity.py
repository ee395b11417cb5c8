"""The packaged model is as good as its card says, measured through the engine's own prompt scores."""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path

import pytest
from local_engine import LocalEngine, greedy

from sailfish.base.config import EngineConfig
from sailfish.checkpoint.tokenizer import Tokenizer
from sailfish.data import demo_model

BOOKS = Path(__file__).parents[2].parent / "shared" / "data" / "books-valid.jsonl.xz"
N_WINDOWS, WINDOW_TOKENS = 60, 1024


@pytest.mark.slow
@pytest.mark.skipif(not BOOKS.exists(), reason="the validation books are not here")
def test_books_4m_has_the_perplexity_of_its_card(tmp_path: Path) -> None:
    with lzma.open(BOOKS, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(8), strict=False)]
    ids = Tokenizer.load(demo_model()).encode("\n\n".join(texts), special=False, add_special=False)
    assert len(ids) >= N_WINDOWS * WINDOW_TOKENS
    engine = LocalEngine.build(demo_model(), tmp_path / "engine", EngineConfig(dtype="float32"))
    for key in range(N_WINDOWS):
        window = ids[key * WINDOW_TOKENS : (key + 1) * WINDOW_TOKENS]
        engine.submit(key, window, greedy(8192, prompt_logprobs=0), 1)
    heard = engine.run()
    scores = [entry.logprob for key in heard for entry in heard[key].prompt_logprobs or []]
    assert len(scores) == N_WINDOWS * (WINDOW_TOKENS - 1)
    perplexity = math.exp(-sum(scores) / len(scores))
    assert perplexity == pytest.approx(39.3, abs=0.05)
