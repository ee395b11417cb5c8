"""`sailfish eval` as typed: through an engine process and through a server, beside lm_eval's figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from live import typed

from sailfish.bench.server import ServerProcess

FROZEN = json.loads((Path(__file__).parents[1] / "cpu" / "lm_eval_rows.json").read_text(encoding="utf-8"))[
    "rows"
]
ROOMY = ("--ctx", "1k", "--concurrency", "8", "--step-tokens", "64", "--kv-memory", "8MiB")
"""What lm_eval lets a model write, 256 tokens, is less than half of its context."""
KINDS = ("lambada", "arc", "gsm8k")


def task_flags(home: Path) -> list[str]:
    flags = []
    for kind in KINDS:
        path = home / f"{kind}.jsonl"
        path.write_text("\n".join(json.dumps(entry["row"]) for entry in FROZEN[kind]), encoding="utf-8")
        flags += ["--tasks", path.name]
    return flags


def check(home: Path, found: dict[str, Any]) -> None:
    """Compare the rows that were written with lm_eval's, and the figures with their means."""
    rows = [json.loads(line) for line in (home / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    for kind, task in zip(KINDS, found["tasks"], strict=True):
        its = [row for row in rows if row["task"] == kind]
        for row, entry in zip(its, FROZEN[kind], strict=True):
            if kind == "gsm8k":
                assert row["written"] == entry["written"]
            else:
                assert row["logprobs"] == pytest.approx(entry["logprobs"], abs=5e-4)
            assert {name: row[name] for name in entry["scores"]} == entry["scores"]
        metric = "exact_match_strict" if kind == "gsm8k" else "acc"
        mean = sum(row[metric] for row in its) / len(its)
        assert task["figures"][metric]["value"] == pytest.approx(mean)
        assert (task["kind"], task["questions"]) == (kind, len(its))


@pytest.mark.slow
def test_an_engine_and_a_server_score_rows_as_lm_eval_does(tmp_path: Path) -> None:
    flags = task_flags(tmp_path)
    (tmp_path / "text.txt").write_text(
        " ".join(entry["row"]["text"] for entry in FROZEN["lambada"]) * 4, encoding="utf-8"
    )
    text = ["--text", "text.txt", "--window", "64", "--windows", "3"]
    common = ["--rows", "rows.jsonl", "--json"]
    built = typed("build", "books-4m", "-o", "b.engine", *ROOMY, cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    ran = typed("eval", "b.engine", *text, *flags, *common, *ROOMY, "--against", "books-4m", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    local = json.loads(ran.stdout)
    check(tmp_path, local)
    figures = local["text"]["figures"]
    assert figures["kl"]["value"] == 0 and figures["top1"]["value"] == 1, "it is its own parent"
    assert figures["acceptance"]["value"] == pytest.approx(1, abs=1e-6)
    with ServerProcess(tmp_path / "b.engine", *ROOMY) as server:
        ran = typed("eval", "b.engine", *text, *flags, *common, "--url", server.url, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
        served = json.loads(ran.stdout)
        check(tmp_path, served)
        wrong = typed("eval", "b.engine", *text, "--url", server.url, "--served", "other", cwd=tmp_path)
        assert wrong.returncode == 2 and f"{server.url} serves " in wrong.stderr
    here, there = (found["text"]["figures"]["perplexity"]["value"] for found in (local, served))
    assert there == pytest.approx(here, rel=1e-5)
    gone = typed("eval", "b.engine", *text, "--url", server.url, cwd=tmp_path)
    assert gone.returncode == 4 and "does not answer" in gone.stderr
    shown = typed("inspect", "b.engine", cwd=tmp_path).stdout
    assert "Evidence: quality" in shown and "Evidence: task arc" in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "there is nothing to measure"),
        (("--tasks", "absent.jsonl"), "absent.jsonl cannot be read: No such file"),
        (("--against", "books-4m", "--tasks", "x"), "--against compares on a text"),
        (("--text", "x", "--rows", "y"), "--rows, --shots and --limit are of task sets"),
        (("--text", "x", "--api-key", "y"), "--served and --api-key are of a server"),
        (("--text", "x", "--url", "y", "--kv-dtype", "int8"), "--kv-dtype would not reach the server"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(
    words: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    ran = typed("eval", "books-4m", *words, cwd=tmp_path)
    assert ran.returncode == 2 and says in ran.stderr and ran.stderr.startswith("error: ")
