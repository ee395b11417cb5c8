"""Settings: their order, their units, and what is said about a wrong one."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from sailfish.base.config import EngineConfig, ServeConfig
from sailfish.base.errors import ConfigError
from sailfish.base.sources import TABLES, Flag, load


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sailfish.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_nothing_given_leaves_every_default() -> None:
    config, origins = load(EngineConfig, environ={"PATH": "/bin"}, flags={})
    assert config == EngineConfig()
    assert set(origins.values()) == {"default"}


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(tmp_path: Path) -> None:
    file = _file(tmp_path, "[engine]\ncontext_tokens = 1\nmax_sequences = 1\nstep_tokens = 1\n")
    environ = {"SAILFISH_MAX_SEQUENCES": "2", "SAILFISH_STEP_TOKENS": "2"}
    flags = {"step_tokens": Flag(spelling="--step-tokens", value="3")}
    config, origins = load(EngineConfig, file=file, environ=environ, flags=flags)
    assert (config.context_tokens, config.max_sequences, config.step_tokens) == (1, 2, 3)
    assert origins["context_tokens"] == f"file {file}"
    assert origins["max_sequences"] == "SAILFISH_MAX_SEQUENCES"
    assert origins["step_tokens"] == "--step-tokens"
    assert origins["dtype"] == "default"


def test_units_follow_the_end_of_the_name() -> None:
    environ = {"SAILFISH_CONTEXT_TOKENS": "32k", "SAILFISH_KV_BYTES": "2GiB", "SAILFISH_DRAIN_S": "500ms"}
    engine, _ = load(EngineConfig, environ=environ, flags={})
    serve, _ = load(ServeConfig, environ=environ, flags={})
    assert (engine.context_tokens, engine.kv_bytes, serve.drain_s) == (32768, 2 * 2**30, 0.5)


@pytest.mark.parametrize(("text", "value"), [("off", False), ("TRUE", True), ("0", False)])
def test_booleans_are_words(text: str, value: bool) -> None:
    config, _ = load(EngineConfig, environ={"SAILFISH_PREFIX_CACHE": text}, flags={})
    assert config.prefix_cache is value


def test_auto_means_that_the_plan_decides() -> None:
    flags = {"dtype": Flag(spelling="--dtype", value="auto")}
    config, _ = load(EngineConfig, environ={"SAILFISH_DTYPE": "bf16"}, flags=flags)
    assert config.dtype is None


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"SAILFISH_CONTEXT_TOKEN": "1"}, "did you mean SAILFISH_CONTEXT_TOKENS?"),
        ({"SAILFISH_CONTEXT_TOKENS": "many"}, "context_tokens from SAILFISH_CONTEXT_TOKENS: "),
        ({"SAILFISH_CONTEXT_TOKENS": "0"}, "it must be at least 1"),
        ({"SAILFISH_CONTEXT_TOKENS": "-4"}, "'-4'"),
        ({"SAILFISH_PREFIX_CACHE": "perhaps"}, "'perhaps' is not one of true"),
        ({"SAILFISH_DTYPE": "float16"}, "'float16' is not one of float32, fp32, bfloat16, bf16"),
        ({"SAILFISH_LAG": "2"}, "it must be 0 to 1"),
    ],
)
def test_a_wrong_variable_is_named_with_its_fix(environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(EngineConfig, environ=environ, flags={})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[engin]\n", "did you mean engine?"),
        ("[engine]\nstep_token = 4\n", "did you mean step_tokens?"),
        ("engine = 4\n", "it must be a table"),
        ("[engine\n", "settings file"),
        ("[engine]\nstep_tokens = [1]\n", "step_tokens from file"),
    ],
)
def test_a_wrong_file_is_named_with_its_fix(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=".") as caught:
        load(EngineConfig, file=_file(tmp_path, text), environ={}, flags={})
    assert said in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="settings file"):
        load(EngineConfig, file=tmp_path / "absent.toml", environ={}, flags={})


def test_the_tables_share_a_file_and_an_environment_without_mixing(tmp_path: Path) -> None:
    file = _file(tmp_path, '[serve]\nport = 9000\n[engine]\ndevice = "cpu"\n')
    serve, _ = load(ServeConfig, file=file, environ={"SAILFISH_DTYPE": "fp32"}, flags={})
    engine, _ = load(EngineConfig, file=file, environ={"SAILFISH_HOST": "::1"}, flags={})
    assert (serve.port, engine.device) == (9000, "cpu")


def test_no_field_name_stands_in_two_tables() -> None:
    """The environment has one name a field, so two tables cannot share one."""
    names = [field.name for table in TABLES.values() for field in fields(table)]
    assert len(names) == len(set(names))
