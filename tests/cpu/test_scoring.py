"""Likelihoods and task scores, row by row, beside what lm_eval gave the same rows with the same model."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from sailfish.base.errors import ConfigError, SailfishError
from sailfish.bench.evaluate import measure_tasks, text_windows
from sailfish.bench.scoring import HttpModel, ScoredToken, score_tasks, score_windows
from sailfish.checkpoint.tokenizer import Tokenizer
from sailfish.data import demo_model
from sailfish.quality.evaluate import score
from sailfish.quality.model import WindowModel
from sailfish.quality.tasks import read_tasks

FROZEN = json.loads(Path(__file__).with_name("lm_eval_rows.json").read_text(encoding="utf-8"))["rows"]


class LocalModel:
    """Reads texts in this process; what it would write is given."""

    def __init__(self, written: Sequence[str] = (), room: int = 1024) -> None:
        self._model = WindowModel.of_checkpoint(demo_model())
        self._written = list(written)
        self.room = room
        self.logprobs: list[float] = []

    async def score(self, ids: Sequence[int]) -> list[ScoredToken]:
        """Return what each token but the first was given."""
        assert 1 < len(ids) <= self.room
        logits_TV = self._model.logits(self._model.hidden(ids)[:-1]).double()
        target_T = torch.tensor(ids[1:])
        logprob_T = logits_TV.log_softmax(1).gather(1, target_T[:, None])[:, 0]
        top_T = logits_TV.argmax(1) == target_T
        return [ScoredToken(float(p), bool(top)) for p, top in zip(logprob_T, top_T, strict=True)]

    async def write(self, ids: Sequence[int], until: Sequence[str], max_tokens: int) -> str:
        """Return the next given text."""
        assert len(ids) + max_tokens <= self.room + 1 and until == ("Question:", "</s>", "<|im_end|>")
        return self._written.pop(0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(demo_model())


def task_file(kind: str, directory: Path) -> Path:
    path = directory / f"{kind}.jsonl"
    path.write_text("\n".join(json.dumps(entry["row"]) for entry in FROZEN[kind]), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["lambada", "hellaswag", "arc", "gsm8k"])
def test_every_row_has_the_likelihoods_and_scores_of_lm_eval(
    kind: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = LocalModel([entry["written"] for entry in FROZEN[kind] if "written" in entry])
    tasks = read_tasks(task_file(kind, tmp_path))
    scores = asyncio.run(score_tasks(model, tokenizer, tasks, lambda done, total: None))
    for found, given, entry in zip(scores.rows, scores.given, FROZEN[kind], strict=True):
        assert {name: found[name] for name in entry["scores"]} == entry["scores"]
        if not isinstance(given, str):
            assert [one.logprob for one in given] == pytest.approx(entry["logprobs"], abs=2e-4)


def test_a_text_that_is_too_long_loses_its_beginning(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    rows = [{"context": "It was a dark night. " * 20, "choices": ["and the", "a"], "label": 0}] * 2
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    model = LocalModel(room=24)
    short = asyncio.run(score_tasks(model, tokenizer, read_tasks(path), lambda done, total: None))
    ids = tokenizer.encode(rows[0]["context"].rstrip() + "  and the")[-24:]
    n_scored = len(tokenizer.encode(rows[0]["context"].rstrip() + "  and the")) - len(
        tokenizer.encode(rows[0]["context"].rstrip())
    )
    expected = sum(token.logprob for token in asyncio.run(model.score(ids))[-n_scored:])
    given = short.given[0]
    assert not isinstance(given, str) and given[0].logprob == pytest.approx(expected)


def test_rows_tell_what_was_given_and_stages_how_far_it_is(tokenizer: Tokenizer, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    tasks = read_tasks(task_file("arc", tmp_path), n_shots=1, limit=3)
    with (tmp_path / "rows.jsonl").open("w") as rows:
        [measured] = asyncio.run(
            measure_tasks(LocalModel(), tokenizer, [tasks], rows, lambda *stage: told.append(stage))
        )
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [1, 2, 3] and told == [("arc", n, 3) for n in (1, 2, 3)]
    assert measured.figures["acc"].value == pytest.approx(sum(line["acc"] for line in lines) / 3)
    assert all(len(line["logprobs"]) >= 3 for line in lines)


def test_windows_scored_one_by_one_have_the_perplexity_of_the_text(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(entry["row"]["text"] for entry in FROZEN["lambada"]) * 3, encoding="utf-8")
    text = text_windows(path, tokenizer, window_tokens=32, n_windows=3)
    model = LocalModel()
    nll = asyncio.run(
        score_windows(model, [window.tokens for window in text.windows], lambda done, total: None)
    )
    expected = score(WindowModel.of_checkpoint(demo_model()), text.windows)
    for found, wanted in zip(nll, expected.nll, strict=True):
        assert found == pytest.approx(wanted.tolist(), abs=1e-4)


def test_a_text_is_cut_alike_whether_its_start_or_all_of_it_is_read(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(entry["row"]["text"] for entry in FROZEN["lambada"]) * 9, encoding="utf-8")
    some = text_windows(path, tokenizer, window_tokens=32, stride_tokens=8, n_windows=4)
    every = text_windows(path, tokenizer, window_tokens=32, stride_tokens=8)
    assert [w.tokens for w in some.windows] == [w.tokens for w in every.windows[:4]]
    assert some.n_scored == 31 + 3 * 8 and some.sha256 != every.sha256
    spaced = tmp_path / "spaced.txt"  # tokens of more characters than are read at first
    spaced.write_text(" " * 3000 + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert len(text_windows(spaced, tokenizer, window_tokens=32, n_windows=4).windows) == 4


@contextmanager
def answering(*replies: tuple[int, Any]) -> Iterator[str]:
    """Serve these (status, JSON) one after the other; the last again and again."""
    left = list(replies)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def do_GET(self) -> None:
            status, reply = left.pop(0) if len(left) > 1 else left[0]
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


MODELS = (200, {"data": [{"id": "m", "max_model_len": 64}]})


def test_a_servers_scores_are_read_as_the_api_has_them() -> None:
    logprobs = {
        "token_logprobs": [None, -1.0, -2.0, -9.0],
        "top_logprobs": [None, {"a": -1.0}, {"b": -0.5}, {}],
    }
    reply = {"choices": [{"logprobs": logprobs, "text": "xy"}]}
    with answering(MODELS, (200, reply)) as url, closing(HttpModel(f"{url}/v1/")) as model:
        assert (model.name, model.room) == ("m", 63)
        assert asyncio.run(model.score([5, 6, 7])) == [ScoredToken(-1.0, True), ScoredToken(-2.0, False)]
        assert asyncio.run(model.write([5], (), 4)) == "xy"


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ((200, {"choices": [{"text": "", "logprobs": None}]}), "does not score its prompts"),
        (
            (200, {"choices": [{"logprobs": {"token_logprobs": [None], "top_logprobs": [None]}}]}),
            "does not score",
        ),
        ((200, {"choices": []}), "not as OpenAI's completions do"),
        ((401, {"error": {"message": "no key"}}), "refused: no key"),
        ((500, "broken"), "refused: status 500"),
    ],
)
def test_a_server_that_does_not_score_is_named(reply: tuple[int, Any], says: str) -> None:
    with (
        answering(MODELS, reply) as url,
        closing(HttpModel(url)) as model,
        pytest.raises(SailfishError, match=says),
    ):
        asyncio.run(model.score([5, 6, 7]))


def test_a_server_without_the_model_that_is_asked_for_is_named() -> None:
    with answering(MODELS) as url, pytest.raises(ConfigError, match="serves m, not other"):
        HttpModel(url, name="other")
    with answering((200, {})) as url, pytest.raises(ConfigError, match="serves no model"):
        HttpModel(url)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a server"):
        HttpModel(url)
