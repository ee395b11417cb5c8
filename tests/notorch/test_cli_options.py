"""The flags that set configurations, from the terminal's words to frozen values."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from sailfish.base.config import EngineConfig, ServeConfig
from sailfish.cli import options
from sailfish.cli.options import ENGINE, SAMPLING, SERVE, Settings, with_settings
from sailfish.engine.api import SamplingParams


def _parsed(*words: str) -> Settings:
    """Return what a command with every table of flags gets for these words."""
    got: list[Settings] = []
    app = typer.Typer()

    @app.command()
    @with_settings(ENGINE, SERVE, SAMPLING)
    def command(model: options.Model = "m", *, settings: Settings) -> None:
        got.append(settings)

    app(list(words), standalone_mode=False)
    return got[0]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sailfish.base.sources.environment", dict)


def test_every_field_of_both_configurations_has_exactly_one_flag() -> None:
    for table, kind in ((ENGINE, EngineConfig), (SERVE, ServeConfig)):
        assert sorted(row.field for row in table) == sorted(kind.__dataclass_fields__)


def test_every_sampling_flag_sets_a_sampling_parameter() -> None:
    assert {row.field for row in SAMPLING} <= set(SamplingParams.__struct_fields__)


def test_every_flag_with_a_value_names_it_and_no_switch_does() -> None:
    for row in (*ENGINE, *SERVE, *SAMPLING):
        assert (row.metavar is None) == ("/" in row.flag), row.flag


def test_no_flags_mean_all_defaults() -> None:
    settings = _parsed()
    assert settings.engine == EngineConfig()
    assert settings.serve == ServeConfig()
    assert settings.sampling == SamplingParams()


def test_words_become_values_with_units_and_origins() -> None:
    settings = _parsed(
        "--ctx", "4k", "--memory", "2GiB", "--no-prefix-cache", "--drain", "500ms", "--port", "0"
    )
    assert settings.engine.context_tokens == 4096
    assert settings.engine.memory_bytes == 2 * 2**30
    assert settings.engine.prefix_cache is False
    assert (settings.serve.drain_s, settings.serve.port) == (0.5, 0)
    assert settings.origins["context_tokens"] == "--ctx"
    assert settings.origins["dtype"] == "default"


def test_sampling_words_become_parameters() -> None:
    settings = _parsed("--temperature", "0.5", "--stop", "a", "--stop", "b", "--ignore-eos", "--n", "2")
    assert settings.sampling == SamplingParams(temperature=0.5, stop=("a", "b"), ignore_eos=True, n=2)


def test_a_settings_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('[engine]\ndtype = "bf16"\n', encoding="utf-8")
    settings = _parsed("--config", str(file))
    assert settings.engine.dtype == "bfloat16"
    assert settings.origins["dtype"] == f"file {file}"
