"""Rows of quality: the figures of a case, and whether they are as wanted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sailfish.base.errors import ConfigError
from sailfish.bench.quality import Case, Measuring, Table, figures
from sailfish.bench.results import Recorder
from sailfish.compress import recipe as recipes
from sailfish.compress.block import Device
from sailfish.compress.make import Request, make
from sailfish.compress.parent import ParentStates
from sailfish.data import demo_model, sample_text
from sailfish.hardware.probe import probe
from sailfish.quality.scores import Comparison

CASES = Path(__file__).parents[2] / "benchmarks" / "quality" / "cases.json"


def measuring(n_windows: int = 3) -> Measuring:
    return Measuring(
        source=demo_model(),
        calibration=sample_text(),
        evaluation=sample_text(),
        n_windows=n_windows,
        n_near=2,
        window_tokens=32,
        hardware=probe("cpu"),
        recipes=CASES.parent,
    )


def silent(what: str, done: int, total: int) -> None:
    """Take progress and say nothing."""


def test_every_case_names_a_recipe_that_can_be_read() -> None:
    own = {path.stem for path in CASES.parent.glob("*.yaml")}
    named = {case.recipe for case in Table.read(CASES).cases if case.recipe is not None}
    assert own <= named
    for name in named:
        assert recipes.load(str(CASES.parent / f"{name}.yaml") if name in own else name).name == name


def test_a_recipe_is_measured_alike_whether_or_not_its_parent_was_read_before() -> None:
    shared = measuring()
    first = shared.comparison(Case(name="first", recipe="fp8"), silent)
    again = shared.comparison(Case(name="again", recipe="w8a8-rtn"), silent)
    alone = measuring().comparison(Case(name="again", recipe="w8a8-rtn"), silent)
    for one, other in ((first.parent.nll, again.parent.nll), (again.model.nll, alone.model.nll)):
        assert np.array_equal(np.concatenate(one), np.concatenate(other))
    assert np.array_equal(np.concatenate(again.kl), np.concatenate(alone.kl))


def test_a_parent_that_read_other_windows_is_read_again() -> None:
    parent = ParentStates()

    def report(n_windows: int) -> object:
        request = Request(
            source=demo_model(),
            recipe=recipes.parse(
                recipes.text(recipes.load("fp8")).replace("tokens: 1024", "tokens: 32").encode(), "here"
            ),
            calibration=None,
            evaluation=sample_text(),
            n_evaluation=n_windows,
            on=Device(target="cpu", dtype="float32"),
            device_name="cpu",
            free_bytes=0,
            parent=parent,
        )
        return make(request, None, silent).quality

    few = report(2)
    assert report(3) != few
    assert report(2) == few


def test_figures_are_of_all_windows_or_of_the_first_and_paired_with_the_parent() -> None:
    generator = np.random.default_rng(0)
    parent = generator.normal(3, 1, (5, 8))
    apart = np.full((5, 1), 0.01)
    near = generator.random((2, 5, 8))
    columns = parent + apart, parent, near[0], near[1], near[1]
    found = figures(Comparison.of_windows(zip(*columns, strict=True)), 2)
    assert found["increase"].value == pytest.approx(100 * np.expm1(0.01))
    assert found["increase"].low == pytest.approx(found["increase"].high)
    assert found["perplexity"].value == pytest.approx(np.exp((parent + apart).mean()))
    assert found["perplexity"].low == pytest.approx(found["perplexity"].high)
    assert found["kl"].value == pytest.approx(near[0, :2].mean())
    assert found["top1"].value == pytest.approx(100 * near[1, :2].mean())


def test_rows_carry_the_figure_its_interval_the_bar_and_the_best_peer() -> None:
    case = Case(
        name="case",
        recipe="fp8",
        peers={"one": {"kl": 0.2, "top1": 80.0}, "other": {"kl": 0.3, "top1": 90.0}},
        bars={"kl": 0.1},
    )
    comparison = Comparison.of_windows(np.random.default_rng(1).random((4, 5, 6)))
    recorder = Recorder(suite="quality", device="cpu", command="", calibration={})
    rows = {row.row: row for row in measuring().results(case, comparison, recorder)}
    assert list(rows) == [f"books-4m case: {name}" for name in ("perplexity", "increase", "kl", "top1")]
    kl, top1 = rows["books-4m case: kl"], rows["books-4m case: top1"]
    found = figures(comparison, 2)["kl"]
    assert kl.value == pytest.approx(found.value, rel=1e-4)
    assert kl.spread == pytest.approx(found.high - found.low, rel=1e-4)
    assert (kl.target, kl.peer, kl.peer_value) == (0.1, "one", 0.2)
    assert (top1.target, top1.peer, top1.peer_value) == (None, "other", 90.0)


@pytest.mark.parametrize(
    ("metric", "value", "spread", "is_met"),
    [
        ("kl", 0.21, 0.02, True),
        ("kl", 0.21, 0.01, False),
        ("kl", 0.19, 0.0, True),
        ("top1", 79.0, 2.0, True),
        ("top1", 79.0, 1.0, False),
        ("perplexity", 1.0, 0.0, None),
    ],
)
def test_without_a_bar_a_figure_may_be_worse_than_the_peers_by_half_its_interval(
    metric: str, value: float, spread: float, is_met: bool | None
) -> None:
    case = Case(name="case", recipe="fp8", peers={"one": {"kl": 0.2, "top1": 80.0, "increase": 1.0}})
    assert case.is_met_by(metric, value, spread) is is_met  # type: ignore[arg-type]
    assert case.is_met_by("increase", 0.0, 0.0) is None


def test_a_bar_is_kept_without_regard_to_the_interval() -> None:
    case = Case(name="case", recipe="fp8", bars={"kl": 0.1, "top1": 90.0}, peers={"one": {"perplexity": 2.0}})
    assert case.is_met_by("kl", 0.1, 9.0) and not case.is_met_by("kl", 0.1001, 9.0)
    assert case.is_met_by("top1", 90.0, 9.0) and not case.is_met_by("top1", 89.9, 9.0)
    assert case.is_met_by("perplexity", 9.0, 0.0) is None


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ({"name": "a"}, "needs either a recipe or kv"),
        ({"name": "a", "recipe": "fp8", "kv": "int8"}, "needs either a recipe or kv"),
        ({"name": "a", "recipe": "fp8", "peer": {}}, "peer"),
    ],
)
def test_a_case_that_cannot_be_is_refused(case: dict[str, object], said: str, tmp_path: Path) -> None:
    path = tmp_path / "cases.json"
    path.write_text(json.dumps({"model": "m", "about": "", "cases": [case]}))
    with pytest.raises(ConfigError, match=said):
        Table.read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Table.read(tmp_path / "none.json")


def test_a_cache_in_8_bits_is_measured_beside_the_parents() -> None:
    found = figures(measuring().comparison(Case(name="kv", kv="int8"), silent), 3)
    assert 0 < found["kl"].value < 0.01
    same = figures(measuring().comparison(Case(name="kv", kv="float32"), silent), 3)
    assert same["kl"].value == 0 and same["increase"].value == 0


def test_the_page_says_what_was_missed_and_what_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(CASES.parents[2] / "scripts")
    from quality_table import section

    near = Case(name="near", recipe="fp8", bars={"kl": 0.5})
    cases = [near, Case(name="far", recipe="fp8", bars={"kl": 0.1}), Case(name="none", recipe="fp8")]
    recorder = Recorder(suite="quality", device="cpu", command="", calibration={})
    comparison = Comparison.of_windows(np.full((3, 5, 4), 0.25))
    rows = {row.row: row for case in cases[:2] for row in measuring().results(case, comparison, recorder)}
    page = section(rows, Table(model="books-4m", about="others", cases=cases))
    assert any(line.startswith("**1 of 2 cases as wanted.**") for line in page)
    assert [line.split("|")[-2].strip() for line in page if line.startswith("| ")][1:] == [
        "met",
        "missed: KL",
    ]
    assert "Not measured: none." in page
