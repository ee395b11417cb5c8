"""The engine's tokens are transformers' tokens, whatever else is in the batch and however steps are cut."""

from __future__ import annotations

import errno
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from local_engine import Heard, LocalEngine, greedy
from twins import TWINS, VOCAB_SIZE, load_truth, make_twin

from sailfish.base.config import EngineConfig
from sailfish.base.errors import EngineError
from sailfish.data import demo_model
from sailfish.engine import wire
from sailfish.engine.step import RowSampling

NEW_TOKENS = 128
TIGHT = {"page_tokens": 8, "step_tokens": 48, "max_sequences": 6, "context_tokens": 320}
"""Prompts are cut in chunks, and most sequences wait for a row."""


@pytest.fixture(scope="session")
def twins_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "twins"


def kv_bytes(checkpoint: Path, n_tokens: int) -> int:
    """Memory for so many tokens of a twin's KV in float32."""
    from sailfish.checkpoint.hf_config import load_model_config

    model = load_model_config(checkpoint)
    return n_tokens * model.n_layers * 2 * model.n_kv_heads * model.head_dim * 4


def are_greedy(truth: Any, prompt: list[int], answer: list[int]) -> bool:
    """Whether transformers, fed the prompt and the answer, finds each token the likeliest next one.

    By induction over the answer's tokens this is what its greedy decoding would have produced.
    """
    with torch.inference_mode():
        logits_QV = truth(torch.tensor([prompt + answer])).logits[0]
    likeliest: list[int] = logits_QV[len(prompt) - 1 : -1].argmax(-1).tolist()
    return likeliest == answer


def family_prompts(seed: int) -> list[list[int]]:
    """Prompts of many lengths; half of them share a beginning."""
    draw = random.Random(seed)
    shared = [draw.randrange(256) for _ in range(90)]
    prompts = []
    for i in range(8):
        tail = [draw.randrange(256) for _ in range(draw.randrange(1, 80))]
        prompts.append(shared[: draw.randrange(40, 90)] + tail if i % 2 else tail)
    return prompts


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("family", TWINS)
def test_batched_chunked_cached_preempted_tokens_are_those_of_transformers(
    family: str, lag: int, twins_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoint = make_twin(family, twins_path)
    # Room for about two whole sequences of the eight, so that some are preempted and computed again.
    config = EngineConfig(lag=lag, kv_bytes=kv_bytes(checkpoint, 480), **TIGHT)
    engine = LocalEngine.build(checkpoint, twins_path / f"{family}.engine", config)
    prompts = family_prompts(seed=lag)
    for key, prompt in enumerate(prompts):
        engine.submit(key, prompt, greedy(VOCAB_SIZE), NEW_TOKENS)
    heard = engine.run()
    truth = load_truth(checkpoint)
    for key, prompt in enumerate(prompts):
        assert len(heard[key].token_ids) == NEW_TOKENS
        assert are_greedy(truth, prompt, heard[key].token_ids), f"prompt {key} of {len(prompt)} tokens"
        assert [finish.reason for finish in heard[key].finishes] == ["length"]
    assert engine.scheduler.stats.preemptions > 0
    assert engine.scheduler.stats.prefix_hit_tokens > 0
    assert engine.scheduler.pool.n_used == 0


@pytest.fixture(scope="module")
def books_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("books") / "engine"
    LocalEngine.build(demo_model(), path, EngineConfig(max_sequences=2))
    return path


def books_prompts() -> list[list[int]]:
    from sailfish.checkpoint.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(demo_model())
    texts = ["It was a dark and stormy night", "The captain looked at", "Once", "“My dear,” said she, “"]
    return [tokenizer.encode(text, special=False, add_special=False) for text in texts]


def test_books_4m_continues_as_in_transformers(books_engine: Path) -> None:
    engine = LocalEngine(books_engine, EngineConfig(dtype="float32"))
    prompts = books_prompts()
    for key, prompt in enumerate(prompts):
        engine.submit(key, prompt, greedy(8192), 200)
    heard = engine.run()
    truth = load_truth(demo_model())
    for key, prompt in enumerate(prompts):
        assert len(heard[key].token_ids) == 200
        assert are_greedy(truth, prompt, heard[key].token_ids)


SAMPLED = [
    greedy(
        8192,
        temperature=0.9,
        seed=seed,
        top_p=0.95 if seed % 2 else 1.0,
        top_k=50 if seed % 3 else 8192,
        repetition_penalty=1.2 if seed % 4 == 0 else 1.0,
        presence_penalty=0.5 if seed % 5 == 0 else 0.0,
    )
    for seed in range(12)
]


def one_by_one(
    engine: LocalEngine, prompts: list[list[int]], sampling: list[RowSampling], n: int
) -> list[Heard]:
    """Return what is heard of each prompt when nothing else runs."""
    for key, prompt in enumerate(prompts):
        engine.submit(key, prompt, sampling[key], n)
        engine.run()
    return [engine.heard[key] for key in range(len(prompts))]


@pytest.fixture(scope="module")
def sampled_alone(books_engine: Path) -> list[Heard]:
    engine = LocalEngine(books_engine, EngineConfig(max_sequences=1, prefix_cache=False))
    return one_by_one(engine, books_prompts() * 3, SAMPLED, 60)


@pytest.mark.parametrize("lag", [0, 1])
def test_sampled_tokens_depend_on_seed_and_position_only(
    books_engine: Path, lag: int, sampled_alone: list[Heard]
) -> None:
    together = LocalEngine(
        books_engine,
        EngineConfig(
            lag=lag, page_tokens=8, step_tokens=16, max_sequences=5, context_tokens=128, kv_bytes=400_000
        ),
    )
    for key, prompt in enumerate(books_prompts() * 3):
        together.submit(key, prompt, SAMPLED[key], 60)
    together.run()
    assert together.scheduler.stats.preemptions > 0
    for key, alone in enumerate(sampled_alone):
        assert together.heard[key].token_ids == alone.token_ids
    assert together.heard[0].token_ids != together.heard[4].token_ids  # equal prompts, other seeds


BFLOAT16 = {"dtype": "bfloat16", "page_tokens": 8, "context_tokens": 256}


def cut_prompts() -> list[list[int]]:
    return [prompt[:n] for prompt in books_prompts() for n in (1, 3, 9)]


@pytest.fixture(scope="module")
def bfloat16_alone(books_engine: Path) -> list[list[Heard]]:
    """Return what is heard of each prompt that is alone, and of the first three once more."""
    prompts = cut_prompts()
    sampling = [greedy(8192, logprobs=2)] * len(prompts)
    config = EngineConfig(max_sequences=1, prefix_cache=False, **BFLOAT16)
    return [
        one_by_one(LocalEngine(books_engine, config), some, sampling, 100) for some in (prompts, prompts[:3])
    ]


@pytest.mark.parametrize("lag", [0, 1])
def test_in_bfloat16_a_batch_changes_tokens_only_where_logits_tie(
    books_engine: Path, lag: int, bfloat16_alone: list[list[Heard]], record_property: Any
) -> None:
    together = LocalEngine(books_engine, EngineConfig(lag=lag, step_tokens=16, max_sequences=5, **BFLOAT16))
    for key, prompt in enumerate(cut_prompts()):
        together.submit(key, prompt, greedy(8192, logprobs=2), 100)
    together.run()
    ties = []
    alone, again = bfloat16_alone
    assert [heard.token_ids for heard in again] == [heard.token_ids for heard in alone[:3]], "equal shapes"
    for key, one in enumerate(alone):
        other = together.heard[key]
        at = next((i for i in range(100) if one.token_ids[i] != other.token_ids[i]), None)
        if at is not None:
            best, second = one.logprobs[at].top
            assert {best.token_id, second.token_id} == {one.token_ids[at], other.token_ids[at]}
            ties.append(best.logprob - second.logprob)
    record_property("gaps at the first difference", ties)
    # Logits near 16 are 0.125 apart in bfloat16; two of them may each be rounded by half of that.
    assert all(gap <= 0.125 for gap in ties), ties


def test_logprobs_of_prompt_and_answer_are_those_of_transformers(books_engine: Path) -> None:
    engine = LocalEngine(books_engine, EngineConfig(step_tokens=8, max_sequences=3, page_tokens=8))
    prompts = books_prompts()
    for key, prompt in enumerate(prompts):
        engine.submit(key, prompt, greedy(8192, logprobs=3, prompt_logprobs=2), 12)
    heard = engine.run()
    truth = load_truth(demo_model())
    for key, prompt in enumerate(prompts):
        ids = prompt + heard[key].token_ids
        with torch.inference_mode():
            expected_QV = truth(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        scored = [*(heard[key].prompt_logprobs or []), *heard[key].logprobs]
        assert [entry.token_id for entry in scored] == ids[1:]
        for at, entry in enumerate(scored):
            n_top = 2 if at < len(prompt) - 1 else 3
            assert entry.logprob == pytest.approx(float(expected_QV[at, ids[at + 1]]), abs=1e-4)
            best = expected_QV[at].topk(n_top)
            assert [top.token_id for top in entry.top] == best.indices.tolist()
            assert [top.logprob for top in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_stop_token_ends_the_answer_and_nothing_follows_it(books_engine: Path, lag: int) -> None:
    engine = LocalEngine(books_engine, EngineConfig(lag=lag))
    (prompt, *_) = books_prompts()
    engine.submit(0, prompt, greedy(8192), 40)
    whole = engine.run()[0].token_ids
    stop = whole[10]
    engine.submit(1, prompt, greedy(8192, stop_token_ids=(stop,)), 40)
    first = engine.run()[1]
    assert first.token_ids == whole[: whole.index(stop) + 1]
    assert first.finishes == [wire.Finish("stop", stop_token=stop)]
    assert engine.scheduler.pool.n_used == 0


@pytest.mark.parametrize("lag", [0, 1])
def test_a_step_that_raises_ends_its_own_sequences_and_the_next_request_is_fine(
    books_engine: Path, lag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LocalEngine(books_engine, EngineConfig(lag=lag))
    prompts = books_prompts()
    engine.submit(0, prompts[0], greedy(8192), 40)
    for _ in range(5):
        engine.loop.step()
    with monkeypatch.context() as patch:

        def explode(*_: object) -> None:
            raise RuntimeError("planted")

        patch.setattr(engine.booted.runner._decoder, "forward", explode)
        engine.submit(1, prompts[1], greedy(8192), 40)
        engine.loop.step()
        engine.loop.step()
    heard = engine.run()
    assert {heard[key].finishes[0].reason for key in (0, 1)} == {"error"}
    engine.submit(2, prompts[0], greedy(8192), 40)
    engine.run()
    assert len(engine.heard[2].token_ids) == 40
    assert are_greedy(load_truth(demo_model()), prompts[0], engine.heard[2].token_ids)
    assert engine.scheduler.pool.n_used == 0


def test_a_device_that_fails_every_step_ends_the_engine_with_a_last_word_for_everybody(
    books_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LocalEngine(books_engine, EngineConfig(max_sequences=2))

    def explode(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(engine.booted.runner._decoder, "forward", explode)
    for key in range(40):
        engine.submit(key, [5, 6, 7], greedy(8192), 4)
    with pytest.raises(EngineError, match="8 steps failed one after the other"):
        engine.run()
    assert len(engine.heard) == 40
    assert {len(heard.finishes) for heard in engine.heard.values()} == {1}
    assert {heard.finishes[0].reason for heard in engine.heard.values()} == {"error", "abort"}


def test_an_engine_that_cannot_be_written_to_starts_and_says_what_it_could_not_keep(
    books_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(books_engine, tmp_path / "engine")
    for overlay in (tmp_path / "engine").glob("overlay-*"):
        overlay.unlink()

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkstemp", read_only)  # a real one would not stop root
    engine = LocalEngine(tmp_path / "engine", EngineConfig(max_sequences=2))
    assert "Read-only file system; the next start measures again" in caplog.text
    engine.submit(0, [5, 6, 7], greedy(8192), 4)
    assert len(engine.run()[0].token_ids) == 4


def test_nan_logits_end_only_their_own_sequence(books_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(books_engine, EngineConfig())
    prompts = books_prompts()
    decoder = engine.booted.runner._decoder
    whole = decoder.logits

    def poisoned(hidden_SD: torch.Tensor) -> torch.Tensor:
        logits_SV = whole(hidden_SD)
        if logits_SV.shape[0] == 2:
            logits_SV[1, 7] = torch.nan
        return logits_SV

    engine.submit(0, prompts[0], greedy(8192), 30)
    engine.submit(1, prompts[1], greedy(8192), 30)
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "logits", poisoned)
        engine.loop.step()
    heard = engine.run()
    assert sorted(heard[key].finishes[0].reason for key in (0, 1)) == ["error", "length"]
    assert {f.code for h in heard.values() for f in h.finishes} == {"", "nan_logits"}
