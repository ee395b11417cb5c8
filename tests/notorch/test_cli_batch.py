"""Batches of JSON lines: what is read, what is refused before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from sailfish.base.errors import ConfigError, RequestError
from sailfish.cli import batch
from sailfish.engine.api import SamplingParams


def _lines(tmp_path: Path, text: str) -> list[dict[str, object]]:
    path = tmp_path / "in.jsonl"
    path.write_text(text, encoding="utf-8")
    return batch.read(path)


def test_blank_lines_are_skipped_and_both_forms_are_read(tmp_path: Path) -> None:
    rows = _lines(tmp_path, '{"prompt": "a"}\n\n{"messages": [], "id": 7, "top_k": 3}\n')
    assert [sorted(row) for row in rows] == [["prompt"], ["id", "messages", "top_k"]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: "),
        ("[]", "line 2: "),
        ('{"id": 1}', "line 2: it needs either prompt or messages"),
        ('{"prompt": "a", "messages": []}', "line 2: it needs either prompt or messages"),
        ('{"prompt": 5}', "line 2: prompt is text or token ids"),
        ('{"messages": ["hi"]}', "line 2: prompt is text or token ids, messages are objects"),
        ('{"prompt": "a", "max_token": 3}', "line 2: unknown field 'max_token'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _lines(tmp_path, '{"prompt": "a"}\n' + line + "\n")
    assert said in str(caught.value)


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    """The Unicode line and paragraph separators may stand raw in a JSON string (RFC 8259, section 7)."""
    rows = _lines(tmp_path, '{"prompt": "a\u2028b\u2029c\x85d"}\r\n{"prompt": "e"}')
    assert [row["prompt"] for row in rows] == ["a\u2028b\u2029c\x85d", "e"]


def test_a_line_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ConfigError, match="line 2: "):
        batch.read(tmp_path / "in.jsonl")


def test_answers_are_never_written_over_the_requests(tmp_path: Path) -> None:
    requests = tmp_path / "in.jsonl"
    requests.write_text('{"prompt": "a"}', encoding="utf-8")
    (tmp_path / "link.jsonl").symlink_to(requests)
    for target in (requests, tmp_path / "link.jsonl", tmp_path / "x" / ".." / "in.jsonl"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match="holds the requests"):
            batch.open_for_answers(target, requests)
    assert requests.read_text(encoding="utf-8") == '{"prompt": "a"}'


def test_opening_the_answers_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "out.jsonl").write_text("old", encoding="utf-8")
    batch.open_for_answers(tmp_path / "out.jsonl", tmp_path / "in.jsonl").close()
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == "old"
    with pytest.raises(ConfigError, match="No such file or directory"):
        batch.open_for_answers(tmp_path / "absent" / "out.jsonl", tmp_path / "in.jsonl")


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        batch.read(tmp_path / "absent.jsonl")


def test_a_lines_parameters_replace_those_of_the_command_line() -> None:
    defaults = SamplingParams(max_tokens=5, seed=1, stop=("x",))
    params = batch.params_of({"prompt": "a", "seed": 2}, defaults)
    assert params == SamplingParams(max_tokens=5, seed=2, stop=("x",))


def test_a_parameter_of_the_wrong_type_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="sampling parameters"):
        batch.params_of({"prompt": "a", "seed": "two"}, SamplingParams())
