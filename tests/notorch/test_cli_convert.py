"""`sailfish convert` as it is typed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from test_formats_convert import UP, small, weights

from sailfish.checkpoint.files import read_json
from sailfish.cli.main import main


def run(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["sailfish", "convert", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_a_checkpoint_goes_to_another_format_and_to_dense_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = small(tmp_path / "source")
    assert run(monkeypatch, source, "--to", "gptq", "-o", tmp_path / "gptq") == 0
    assert "gptq, every weight the same number" in capsys.readouterr().out
    assert (weights(tmp_path / "gptq")[UP] == weights(source)[UP]).all()
    assert run(monkeypatch, source, "--to", "dense", "--dtype", "bfloat16", "-o", tmp_path / "dense") == 0
    assert "dense, bfloat16" in capsys.readouterr().out
    assert read_json(tmp_path / "dense" / "config.json")["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--to", "gguf"), "format 'gguf' is not written (use one of gptq, gptq_v2, awq"),
        (("--to", "awq", "--dtype", "float16"), "--dtype is that of dense weights"),
        (("--to", "dense", "--dtype", "int8"), "dtype 'int8' is not written (use one of float32"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(
    words: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = small(tmp_path / "source")
    assert run(monkeypatch, source, *words, "-o", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and says in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
