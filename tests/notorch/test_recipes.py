"""Recipes: what is packaged, what is refused and how it is said; and the page that reports are drawn on."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sailfish.base.errors import ConfigError
from sailfish.cli.main import application
from sailfish.compress import recipe as recipes
from sailfish.compress.page import page
from sailfish.compress.report import (
    Estimate,
    Fallback,
    LinearFacts,
    Quality,
    Removed,
    Report,
    from_json,
    to_json,
)

BEGIN = "name: mine\nabout: a test\nlayout: pack-quantized\n"


@pytest.mark.parametrize("name", recipes.names())
def test_every_packaged_recipe_is_read_and_written_out_again(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name
    assert recipe.about.endswith(".")
    assert recipes.parse(recipes.text(recipe).encode(), "again") == recipe


def test_the_difference_of_two_recipes_is_told_by_its_values() -> None:
    one, other = recipes.load("w4a16-gptq"), recipes.load("w4a16-best")
    found = recipes.diff(one, other)
    assert "-  sweeps: 0" in found and "+  sweeps: 3" in found
    assert not recipes.diff(one, one)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BEGIN + "round: {too: int4}", "too is not a key here .did you mean to?"),
        (BEGIN + "rouns: {to: int4}", "rouns is not a key here .did you mean round?"),
        (BEGIN + "round: {to: int5}", "Invalid enum value 'int5'"),
        (BEGIN + "round: {to: int4, group: 48}", "groups of 48 inputs in int4"),
        (BEGIN + "round: {to: fp8, group: null}", "fp8 is not stored as pack-quantized"),
        (BEGIN, "nothing is cut, pruned or rounded"),
        (BEGIN + "prune: {method: wanda, keep: 2}\nround: {to: int4}", "prune needs keep and of, or zeros"),
        (BEGIN + "prune: {method: wanda, zeros: 0.5}\nround: {method: gptq}", "GPTQ would fill the zeros"),
        (
            BEGIN.replace("pack-quantized", "dense")
            + "prune: {method: wanda, zeros: 0.5}\nround: {to: int4}",
            "rounded weights stored dense save nothing",
        ),
        (BEGIN + "prune: {method: wanda, zeros: 1.5}\nround: {}", "a share of zeros of 1.5"),
        (BEGIN + "cut: {widht: 0.5}\nround: {}", "widht is not a key here .did you mean width?"),
        (BEGIN + "cut: {width: 1.0}\nround: {}", "no share of layers, heads or width is cut"),
        (BEGIN + "cut: {repair: false}\nround: {}", "no share of layers, heads or width is cut"),
        (BEGIN + "cut: {heads: 0.5, damp: 0}\nround: {}", "a repair with damp 0"),
        (BEGIN + "prune: {method: wanda, keep: 5, of: 4}\nround: {}", "5 of 4 weights cannot be kept"),
        (
            BEGIN + "prune: {method: magnitude, zeros: 0.5, refit: true}\nround: {}",
            "magnitude has no weights to refit",
        ),
        (
            BEGIN + "prune: {method: sparsegpt, zeros: 0.5, refit: true}\nround: {}",
            "sparsegpt has no weights to refit",
        ),
        (BEGIN + "prune: {method: sparsegpt, zeros: 0.5, damp: .nan}\nround: {}", "with damp nan"),
        (BEGIN + "round: {method: gptq, damp: .nan}", "0 sweeps with damp nan"),
        (BEGIN + "round: {}\nbound: {max_kl: .nan}", "the bound is not a number"),
        (BEGIN + "round: {to: int4}\nactivations: dynamic", "has no 8-bit activations"),
        (BEGIN + "round: {to: int4}\nstatic: {method: entropy}", "activations are not static"),
        (
            BEGIN.replace("pack", "float") + "round: {to: fp8, group: null}\n"
            "activations: static\nstatic: {method: entropy}",
            "entropy compares evenly spaced levels",
        ),
        (
            BEGIN.replace("pack", "int") + "round: {to: int8, group: null}\n"
            "activations: static\nstatic: {method: percentile, kept: 0}",
            "0 of all values cannot be kept",
        ),
        (BEGIN + "round: &a {to: int4}\noverrides: [{match: x, round: *a}]", "aliases are not read"),
        (BEGIN + "name: other\nround: {to: int4}", "written twice"),
        (BEGIN + "round: !!python/object/apply:os.getcwd []", "is not YAML"),
        (BEGIN + "round: {to: int4}\noverrides: [{match: 're:(a+)+', round: null}]", "could take very long"),
        ("[1, 2]", "is not a table of keys and values"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(Exception, match=said) as caught:
        recipes.parse(text.encode(), "mine.yaml")
    assert "mine.yaml" in str(caught.value)
    assert type(caught.value).__name__ in ("ConfigError", "UnsupportedModelError")


def test_an_unknown_recipe_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean w4a16-gptq?"):
        recipes.load("w4a16-gptk")
    with pytest.raises(ConfigError, match="cannot be read"):
        recipes.load(str(tmp_path / "none.yaml"))


def test_bits_count_scales_and_zero_points() -> None:
    assert recipes.load("w4a16-gptq").bits_per_weight == 4.125
    assert recipes.load("w4a16-awq").bits_per_weight == 4 + 20 / 128
    assert recipes.load("wanda-2of4").bits_per_weight == 16


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["recipe", "list"], 0, "w4a16-gptq"),
        (["recipe", "show", "fp8"], 0, "to: fp8"),
        (["recipe", "diff", "fp8", "fp8"], 0, ""),
        (["recipe", "diff", "fp8", "w8a8-smooth"], 1, "-layout: float-quantized"),
    ],
)
def test_the_command_lists_prints_and_compares(words: list[str], status: int, said: str) -> None:
    found = CliRunner().invoke(application(words), words)
    assert found.exit_code == status
    assert said in found.output


def report(name: str, **changes: Any) -> Report:
    one = Estimate(value=1.0, low=0.5, high=1.5)
    values: dict[str, Any] = {
        "recipe": {"name": name, "about": "a <b> & c", "bound": {"max_kl": 0.1}},
        "parent": "a-model",
        "parent_digest": "00",
        "sailfish": "0",
        "torch": "0",
        "device": "a device",
        "calibration": "a text",
        "calibration_digest": "11",
        "calibration_windows": 2,
        "calibration_tokens": 3,
        "seed": 0,
        "bytes_before": 2000,
        "bytes_after": 1000,
        "linear_bits": 4.125,
        "quality": Quality(
            text="a text",
            n_windows=2,
            window_tokens=3,
            n_tokens=4,
            dtype="float32",
            perplexity=one,
            parent_perplexity=one,
            increase=one,
            kl=one,
            kl_p99=one,
            kl_p999=one,
            top1=one,
        ),
        "block_drift": [0.1, 0.2],
        "linears": [
            LinearFacts(
                module=f"model.layers.{layer}.mlp.{part}",
                n_out=4,
                n_in=4,
                how="int4 RTN",
                output_error=0.1,
                weight_error=0.2,
                zeros_frac=0.0,
                alpha=None,
                n_bytes=10,
                dense_bytes=32,
            )
            for layer in range(2)
            for part in ("up_proj", "down_proj")
        ],
        "removed": [Removed(where="a <layer>", what="2 of 8 kv heads", influence=0.5, repaired=0.25)],
        "block_influence": [0.3, 0.1],
        "speeds": [],
        "warnings": ["mind <this>"],
        "fallbacks": [Fallback(what="damping", where="a linear", why="it was singular")],
        "seconds": {"methods": 1.0},
        "peak_bytes": 1 << 20,
    }
    return Report(**{**values, **changes})


class _Page(HTMLParser):
    """Checks that every tag is closed in its order, and keeps the text and whatever is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("names", [["one"], ["one", "two", "three"]])
def test_the_page_is_whole_needs_nothing_else_and_says_what_fell_short(names: list[str]) -> None:
    found = _Page()
    found.feed(page([report(name) for name in names]))
    assert not found.open
    assert not found.fetched
    said = "a <b> & c", "mind <this>", "it was singular", "model.layers.1.mlp.up_proj", "a <layer>"
    for words in (*names, *said):
        assert words in found.text


def test_a_report_survives_its_file() -> None:
    assert from_json(to_json(report("one"))) == report("one")
