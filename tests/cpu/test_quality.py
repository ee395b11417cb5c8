"""Metrics beside brute force in float64, intervals beside exact ones, and models beside transformers."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_engine import LocalEngine, greedy
from numpy.typing import NDArray
from paged import load_twin_weights
from torch import Tensor
from twins import CONTEXT_TOKENS, TWINS, VOCAB_SIZE, load_truth, make_twin

from sailfish.base.config import EngineConfig
from sailfish.base.errors import ConfigError, EngineError
from sailfish.build.builder import build_engine
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.checkpoint.tokenizer import Tokenizer
from sailfish.compress.rtn import quantise_8
from sailfish.data import demo_model
from sailfish.kernels.contract import Weight8
from sailfish.plan.types import WeightFormats
from sailfish.quality import evaluate
from sailfish.quality.evaluate import compare, compare_all, score
from sailfish.quality.intervals import bootstrap_interval, normal_interval, quantile_interval
from sailfish.quality.metrics import compare_tokens, token_nll
from sailfish.quality.model import WindowModel
from sailfish.quality.scores import Comparison, Scores, difference
from sailfish.quality.text import read_text
from sailfish.quality.windows import Window, calibration_windows, evaluation_windows

SHARED = Path(__file__).parents[2].parent / "shared"
BOOKS = SHARED / "data" / "books-valid.jsonl.xz"
BOOKS_28M = SHARED / "models" / "books-28m"


def book_windows(model: Path, n_windows: int, window_tokens: int = 1024) -> list[Window]:
    """Return the first windows of the validation books."""
    if not BOOKS.exists() or not model.exists():
        pytest.skip("the validation books or the model are not here")
    text = read_text(BOOKS, max_chars=8 * 1024 * (n_windows + 1))
    ids = Tokenizer.load(model).encode(text, add_special=False)
    return evaluation_windows(ids, window_tokens=window_tokens, n_windows=n_windows)


def random_windows(n_windows: int, n_tokens: int, seed: int, **keys: int) -> list[Window]:
    """Return windows of random tokens of the twins' vocabulary."""
    ids = [random.Random(seed).randrange(VOCAB_SIZE) for _ in range(n_windows * n_tokens)]
    return evaluation_windows(ids, window_tokens=n_tokens, **keys)


def their_log_probs(model: Any, window: Window) -> Tensor:
    """Return log-probabilities_SV in float64 of what comes before each scored token."""
    with torch.inference_mode():
        logits_TV = model(torch.tensor([list(window.tokens)])).logits[0]
    return logits_TV.double().log_softmax(-1)[window.n_context - 1 : -1]


def their_nll(model: Any, window: Window) -> NDArray[np.float64]:
    """Return the negative log-likelihood of each scored token."""
    target_S1 = torch.tensor(window.tokens[window.n_context :]).unsqueeze(1)
    nll: NDArray[np.float64] = -their_log_probs(model, window).gather(1, target_S1).squeeze(1).numpy()
    return nll


# Metrics


@given(
    seed=st.integers(0, 1 << 16),
    vocab=st.integers(1, 70),
    spread=st.sampled_from([0.1, 3.0, 60.0]),
    noise=st.sampled_from([0.0, 1e-3, 0.3, 10.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_every_metric_is_that_of_a_loop_in_float64(
    seed: int, vocab: int, spread: float, noise: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    parent_SV = (torch.randn(4, vocab) * spread + 100).to(dtype)
    logits_SV = (parent_SV.float() + torch.randn(4, vocab) * noise).to(dtype)
    target_S = torch.randint(vocab, (4,))
    found = compare_tokens(logits_SV, parent_SV, target_S)
    assert all(figure_S.dtype == torch.float64 for figure_S in found)
    torch.testing.assert_close(found.nll_S, token_nll(logits_SV, target_S), rtol=0, atol=0)
    for row in range(4):
        p, q = (_probabilities(x_SV[row].double().tolist()) for x_SV in (parent_SV, logits_SV))
        came = int(target_S[row])
        assert float(found.nll_S[row]) == pytest.approx(-math.log(q[came]), abs=2e-6)
        assert float(found.parent_nll_S[row]) == pytest.approx(-math.log(p[came]), abs=2e-6)
        kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)
        assert float(found.kl_S[row]) == pytest.approx(kl, abs=1e-6 * (1 + spread + noise))
        kept = math.fsum(map(min, p, q))
        assert float(found.acceptance_S[row]) == pytest.approx(kept, abs=1e-6)
        assert float(found.is_same_top_S[row]) == (p.index(max(p)) == q.index(max(q)))


def _probabilities(logits: list[float]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(x - largest) for x in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def test_a_divergence_far_below_float32s_rounding_of_log_probabilities_is_found() -> None:
    torch.manual_seed(0)
    parent_SV = torch.randn(64, 8192) * 3
    logits_SV = parent_SV + torch.randn(64, 8192) * 1e-3
    found = compare_tokens(logits_SV, parent_SV, torch.zeros(64, dtype=torch.int64)).kl_S
    log_p, log_q = parent_SV.double().log_softmax(1), logits_SV.double().log_softmax(1)
    torch.testing.assert_close(found, (log_p.exp() * (log_p - log_q)).sum(1), rtol=0.02, atol=2e-8)
    same = compare_tokens(parent_SV, parent_SV + 5, torch.zeros(64, dtype=torch.int64))
    assert same.kl_S.abs().max() < 1e-6 and same.is_same_top_S.min() == 1


def test_the_expected_acceptance_is_how_often_speculative_sampling_keeps_a_token() -> None:
    torch.manual_seed(1)
    draft_SV, target_SV = torch.randn(2, 1, 12)
    expected = float(compare_tokens(draft_SV, target_SV, torch.zeros(1, dtype=torch.int64)).acceptance_S)
    q, p = draft_SV.softmax(1)[0], target_SV.softmax(1)[0]
    drawn_T = torch.multinomial(q, 200_000, replacement=True)
    kept = (torch.rand(len(drawn_T)) < (p / q)[drawn_T]).double().mean()
    assert float(kept) == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(len(drawn_T)))


# Texts


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz"])
def test_texts_of_a_file_are_joined_by_a_blank_line(suffix: str, tmp_path: Path) -> None:
    texts = ["One.\n", "zwei: \u00fc", "\u2028drei"]
    lines = "".join(json.dumps({"title": "-", "text": text}) + "\n" for text in texts)
    pack = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}[suffix]
    for name, content in (("a.jsonl", lines), ("a.txt", "\n\n".join(texts))):
        path = tmp_path / (name + suffix)
        path.write_bytes(pack(content.encode()))
        assert read_text(path) == "\n\n".join(texts)
        for n_chars in (0, 3, 5, 8, 99):
            assert read_text(path, max_chars=n_chars) == "\n\n".join(texts)[:n_chars]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n[1]\n', 'line 2 of .* is not an object with a "text"'),
        ("a.jsonl", b'{"text": 3}\n', "line 1 of"),
        ("a.jsonl", b"{" * 100_000, "line 1 of"),
        ("a.txt", b"good\n\xff\n", "line 2 of .* is not UTF-8"),
        ("a.txt.xz", b"no", "is damaged"),
        ("a.txt.gz", gzip.compress(b"text")[:-4], "is damaged"),
        ("a.txt.gz", b"no", "is damaged"),
        ("absent.txt", None, "No such file"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_in_a_line(
    name: str, content: bytes | None, words: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_text(tmp_path / name)


# Windows


def test_windows_follow_each_other_and_score_all_but_their_first_token() -> None:
    windows = evaluation_windows(range(3_500), window_tokens=1024)
    assert [list(window.tokens) for window in windows] == [
        list(range(k * 1024, k * 1024 + 1024)) for k in range(3)
    ]
    assert [window.n_scored for window in windows] == [1023] * 3
    assert len(evaluation_windows(range(3_500), window_tokens=1024, n_windows=2)) == 2


@given(n_ids=st.integers(2, 300), window=st.integers(2, 40), data=st.data())
@settings(deadline=None)
def test_with_a_shorter_stride_every_token_but_the_first_is_scored_once(
    n_ids: int, window: int, data: st.DataObject
) -> None:
    window = min(window, n_ids)
    stride = data.draw(st.integers(1, window - 1))
    windows = evaluation_windows(range(n_ids), window_tokens=window, stride_tokens=stride)
    scored = [token for w in windows for token in w.tokens[w.n_context :]]
    assert scored == list(range(1, windows[-1].tokens[-1] + 1))
    assert n_ids - stride <= windows[-1].tokens[-1] < n_ids
    assert all(w.n_scored == stride for w in windows[1:])


def test_calibration_takes_the_windows_that_the_anchors_took() -> None:
    ids = range(1_584_741)
    found = [window.tokens[0] // 1024 for window in calibration_windows(ids, 128)]
    assert found == sorted(random.Random(0).sample(range(1547), 128))
    assert len({window.tokens[0] for window in calibration_windows(range(40), 4, window_tokens=10)}) == 4


@pytest.mark.parametrize(
    ("ids", "keys", "words"),
    [
        (10, {"window_tokens": 1}, "a window of 1 tokens scores none"),
        (10, {"window_tokens": 4, "stride_tokens": 5}, "a stride of 5 tokens does not fit windows of 4"),
        (10, {"window_tokens": 4, "stride_tokens": 0}, "a stride of 0 tokens does not fit windows of 4"),
        (10, {"window_tokens": 4, "n_windows": 3}, "10 tokens give 2 windows of 4 tokens, 3 are asked for"),
        (3, {"window_tokens": 4}, "3 tokens give 0 windows of 4 tokens, 1 are asked for"),
    ],
)
def test_windows_that_a_text_cannot_give_are_refused(ids: int, keys: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        evaluation_windows(range(ids), **keys)
    with pytest.raises(ConfigError, match="10 tokens give 2 windows"):
        calibration_windows(range(10), 3, window_tokens=4)


# Intervals


def _windows(seed: int, n_windows: int, n_tokens: int, ragged: bool = False) -> list[NDArray[np.float64]]:
    """Return figures whose windows have means of their own."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 2 * n_tokens, n_windows) if ragged else [n_tokens] * n_windows
    return [generator.normal(generator.normal(0, 0.5), 1, size) + 2 for size in sizes]


def test_a_normal_interval_of_equal_windows_is_the_textbooks() -> None:
    values = _windows(0, 30, 50)
    means = np.array([window.mean() for window in values])
    found = normal_interval(values)
    half = 1.959963984540054 * means.std(ddof=1) / math.sqrt(30)
    assert (found.value, found.low, found.high) == pytest.approx(
        (means.mean(), means.mean() - half, means.mean() + half)
    )
    assert normal_interval(values, confidence=0.99).low < found.low < found.value


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("interval", [normal_interval, bootstrap_interval])
def test_the_true_mean_is_inside_as_often_as_promised(interval: Any, ragged: bool) -> None:
    extra = {} if interval is normal_interval else {"n_resamples": 400}
    n_inside = sum(interval(_windows(s, 60, 20, ragged), **extra).has(2.0) for s in range(400))
    assert 0.91 <= n_inside / 400 <= 0.98, "tokens taken for independent would reach 0.55"


def test_a_bootstrap_agrees_with_all_resamples_there_are() -> None:
    values = _windows(3, 4, 5, ragged=True)
    every = [_mean(drawn) for drawn in itertools.product(values, repeat=4)]
    found = bootstrap_interval(values, confidence=0.8, n_resamples=40_000)
    assert found.value == pytest.approx(_mean(values))
    low, high = np.quantile(every, [0.1, 0.9])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)
    assert found == bootstrap_interval(values, confidence=0.8, n_resamples=40_000), "the seed is fixed"
    many = _windows(3, 20, 5)
    assert bootstrap_interval(many) != bootstrap_interval(many, seed=1)


def _mean(values: Sequence[NDArray[np.float64]]) -> float:
    return float(np.concatenate(values).mean())


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.999])
def test_a_quantiles_bootstrap_agrees_with_all_resamples_there_are(quantile: float) -> None:
    values = _windows(5, 4, 30, ragged=True)

    def of(drawn: Sequence[NDArray[np.float64]]) -> float:
        return float(np.quantile(np.concatenate(drawn), quantile, method="inverted_cdf"))

    every = [of(drawn) for drawn in itertools.product(values, repeat=4)]
    found = quantile_interval(values, quantile, confidence=0.8, n_resamples=20_000)
    assert found.value == of(values)
    low, high = np.quantile(every, [0.1, 0.9])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05)


def test_a_difference_is_paired_window_by_window() -> None:
    """A model worse by a hair everywhere is found out, though windows differ a hundred times as much."""
    parent = _windows(1, 40, 30)
    noise = np.random.default_rng(2)
    worse = [window + 0.01 + noise.normal(0, 0.01, len(window)) for window in parent]
    one, same = (_made(Scores(nll=nll), Scores(nll=parent)) for nll in (worse, parent))
    found = one.summary()
    assert found.increase.has(math.expm1(0.01)) and found.increase.low > 0.009
    assert found.perplexity.has(found.parent_perplexity.value), "unpaired intervals cannot tell"
    apart = difference(one, same)
    assert apart.perplexity.has(math.expm1(0.01)) and apart.perplexity.low > 0.009
    assert (apart.kl.low, apart.top1.value, apart.acceptance.high) == (0, 0, 0)
    assert difference(same, one).perplexity.high < 0
    assert one.first(7).summary().n_windows == 7
    with pytest.raises(ConfigError, match="figures of 40 and 7 windows cannot be paired"):
        difference(one, same.first(7))


def _made(model: Scores, parent: Scores) -> Comparison:
    ones = [np.ones(len(window)) for window in parent.nll]
    return Comparison(model=model, parent=parent, kl=ones, is_same_top=ones, acceptance=ones)


def test_one_window_has_no_interval() -> None:
    for interval in (normal_interval, bootstrap_interval, lambda v: quantile_interval(v, 0.5)):
        with pytest.raises(ConfigError, match="1 window says nothing of how much windows differ"):
            interval(_windows(0, 1, 5))


# Models


@pytest.mark.parametrize("family", sorted(TWINS))
def test_scores_of_every_family_are_transformers_scores(family: str, tmp_path: Path) -> None:
    path = make_twin(family, tmp_path)
    windows = random_windows(2, 150, seed=3)
    found = score(WindowModel.of_checkpoint(path, window_tokens=150), windows)
    truth = load_truth(path)
    for ours, window in zip(found.nll, windows, strict=True):
        np.testing.assert_allclose(ours, their_nll(truth, window), atol=2e-4)


def test_overlapping_windows_score_only_their_last_tokens(tmp_path: Path) -> None:
    path = make_twin("llama", tmp_path)
    windows = random_windows(4, 64, seed=5, stride_tokens=16)
    found = score(WindowModel.of_checkpoint(path, window_tokens=64), windows)
    truth = load_truth(path)
    assert [len(ours) for ours in found.nll] == [63] + [16] * 12
    for ours, window in zip(found.nll, windows, strict=True):
        np.testing.assert_allclose(ours, their_nll(truth, window), atol=2e-4)


def test_a_comparison_is_that_of_transformers_log_probabilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two unlike models, in chunks of 7 rows, at several windows, with the parent read once for both."""
    paths = [make_twin(family, tmp_path) for family in ("llama", "qwen3", "mistral")]
    parent, *models = (WindowModel.of_checkpoint(path, window_tokens=100) for path in paths)
    windows = random_windows(3, 100, seed=9)
    whole = compare_all(models, parent, windows)
    monkeypatch.setitem(evaluate._CHUNK_ELEMENTS, "cpu", 7 * VOCAB_SIZE)
    told: list[tuple[int, int]] = []
    chunked = compare_all(models, parent, windows, lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    their_parent, *theirs = map(load_truth, paths)
    for found, same, truth in zip(chunked, whole, theirs, strict=True):
        for i, window in enumerate(windows):
            log_p, log_q = their_log_probs(their_parent, window), their_log_probs(truth, window)
            np.testing.assert_allclose(found.model.nll[i], their_nll(truth, window), atol=2e-4)
            np.testing.assert_allclose(found.parent.nll[i], their_nll(their_parent, window), atol=2e-4)
            np.testing.assert_allclose(found.kl[i], (log_p.exp() * (log_p - log_q)).sum(1), atol=2e-4)
            np.testing.assert_allclose(
                found.acceptance[i], torch.minimum(log_p.exp(), log_q.exp()).sum(1), atol=2e-5
            )
            assert (found.is_same_top[i] == (log_p.argmax(1) == log_q.argmax(1)).numpy()).all()
            np.testing.assert_allclose(found.kl[i], same.kl[i], atol=2e-5)
    np.testing.assert_array_equal(chunked[0].parent.nll, chunked[1].parent.nll)


def test_a_model_compared_with_itself_is_its_own_parent(tmp_path: Path) -> None:
    model = WindowModel.of_checkpoint(make_twin("qwen2", tmp_path), window_tokens=64)
    found = compare(model, model, random_windows(4, 64, seed=1)).summary()
    assert found.increase.value == 0 and found.top1.value == 1 and found.n_tokens == 4 * 63
    assert abs(found.kl_p999.high) < 1e-6 and found.acceptance.value == pytest.approx(1, abs=1e-6)


def test_rounded_weights_are_measured_where_they_are_made(tmp_path: Path) -> None:
    """8-bit weights in the linears' own classes, beside the dense model of what they stand for."""
    path = make_twin("llama", tmp_path)
    config = load_model_config(path)
    parent = WindowModel.of_checkpoint(path, window_tokens=64)
    windows = random_windows(3, 64, seed=2)
    rounded, dense = (compare(_in_8_bits(path, is_dense), parent, windows) for is_dense in (False, True))
    assert config.context_tokens == CONTEXT_TOKENS
    assert 0 < dense.summary().kl.value < rounded.summary().kl.value < 0.5, "activations are rounded too"
    assert rounded.summary().top1.value > 0.8
    assert difference(rounded, dense).kl.high > 0


def _in_8_bits(path: Path, is_dense: bool) -> WindowModel:
    config = load_model_config(path)
    weights: dict[str, Any] = dict(load_twin_weights(path, config))
    for name in [n for n in weights if n.split(".")[-2] in ("qkv", "o", "gate_up", "down")]:
        if name.endswith(".weight"):
            values_OI, scale_O = quantise_8(weights[name], "int8")
            packed = Weight8(values_OI, scale_O)
            weights[name] = values_OI.float() * scale_O.unsqueeze(1) if is_dense else packed
    formats = WeightFormats() if is_dense else WeightFormats(layers="int8")
    return WindowModel.of_weights(config, weights, formats=formats, window_tokens=64)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_cache_in_8_bits_is_measured_too(kv_dtype: Any, tmp_path: Path) -> None:
    path = make_twin("llama3", tmp_path)
    parent = WindowModel.of_checkpoint(path, window_tokens=96)
    model = WindowModel.of_checkpoint(path, window_tokens=96, kv_dtype=kv_dtype)
    found = compare(model, parent, random_windows(3, 96, seed=4)).summary()
    assert 1e-6 < found.kl.value < 0.1 and found.kl.value < found.kl_p99.value <= found.kl_p999.value


@pytest.mark.usefixtures("quantises_in_this_process")
def test_an_engine_is_read_as_it_runs(tmp_path: Path) -> None:
    """Its scores are those that the running engine gives a prompt's tokens."""
    windows = book_windows(demo_model(), 3, 128)
    config = EngineConfig(dtype="float32", weights="int4", kv_dtype="int8", context_tokens=256)
    engine = build_engine(demo_model(), tmp_path / "engine", config=config, target="cpu")
    parent = WindowModel.of_checkpoint(demo_model(), window_tokens=128)
    found = compare(WindowModel.of_engine(engine, window_tokens=128), parent, windows)
    running = LocalEngine(tmp_path / "engine", config)
    for key, window in enumerate(windows):
        running.submit(key, list(window.tokens), greedy(8192, prompt_logprobs=0), 1)
    heard = running.run()
    for key, ours in enumerate(found.model.nll):
        theirs = [-entry.logprob for entry in heard[key].prompt_logprobs or []]
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
    assert 0.01 < found.summary().kl.value < 0.2, "the weights and the cache are rounded"


def test_logits_that_are_not_finite_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = WindowModel.of_checkpoint(make_twin("llama", tmp_path), window_tokens=32)
    true_logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden_SD: true_logits(hidden_SD) * float("nan"))
    windows = random_windows(2, 32, seed=0)
    for measure in (lambda: score(model, windows), lambda: compare(model, model, windows)):
        with pytest.raises(EngineError, match="the logits of window 1 are not finite at 31 tokens"):
            measure()


def test_windows_and_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = make_twin("llama", tmp_path)
    model = WindowModel.of_checkpoint(path, window_tokens=32)
    for windows, words in (
        ([], "there is no window to read"),
        ([Window(tokens=range(33))], "window 1 has 33 tokens, 1 of them context; the models read up to 32"),
        ([Window(tokens=range(8), n_context=8)], "8 of them context"),
        ([Window(tokens=range(8), n_context=0)], "0 of them context"),
        ([Window(tokens=[0, VOCAB_SIZE])], f"tokens that are not among the models' {VOCAB_SIZE}"),
        ([Window(tokens=[0, -1])], f"tokens that are not among the models' {VOCAB_SIZE}"),
    ):
        with pytest.raises(ConfigError, match=words):
            score(model, windows)
    with pytest.raises(ConfigError, match="windows of 513 tokens are longer than the model's context, 512"):
        WindowModel.of_checkpoint(path, window_tokens=CONTEXT_TOKENS + 1)
    with pytest.raises(ConfigError, match="models of 320 and 8192 tokens cannot be compared"):
        compare(WindowModel.of_checkpoint(demo_model()), model, [Window(tokens=range(8))])


def test_the_packaged_model_scores_books_as_transformers_does() -> None:
    windows = book_windows(demo_model(), 2)
    found = score(WindowModel.of_checkpoint(demo_model()), windows)
    truth = load_truth(demo_model())
    for ours, window in zip(found.nll, windows, strict=True):
        np.testing.assert_allclose(ours, their_nll(truth, window), atol=1e-4)


@pytest.mark.slow
def test_the_larger_model_scores_books_as_transformers_does() -> None:
    windows = book_windows(BOOKS_28M, 2)
    found = score(WindowModel.of_checkpoint(BOOKS_28M), windows)
    truth = load_truth(BOOKS_28M)
    theirs = [their_nll(truth, window) for window in windows]
    for ours, nll in zip(found.nll, theirs, strict=True):
        np.testing.assert_allclose(ours, nll, atol=1e-4)
    expected = math.exp(float(np.concatenate(theirs).mean()))
    assert found.perplexity().value == pytest.approx(expected, abs=1e-4)
