"""Task sets: the questions that lm_eval would put, and what answers are worth."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from sailfish.base.errors import ConfigError
from sailfish.quality.task_scores import Likelihood, TaskScores, collected, score_answer
from sailfish.quality.tasks import AnswerQuestion, ChoiceQuestion, WordQuestion, read_tasks

GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k-test.jsonl.xz"
LAMBADA = {"text": "She opened the old door"}
HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "A man stands in a kitchen. [header] He",
    "ctx_b": "takes [substeps] flour",
    "endings": ["and  bakes [title] Enjoy", "and leaves [step]."],
    "label": "1",
}
ARC = {
    "question": "What melts?",
    "choices": {"text": ["Ice", "Stone", "Fire"], "label": ["A", "B", "C"]},
    "answerKey": "C",
}
GSM = {"question": "How many?", "answer": "Two and two.\n#### 1,004"}
CHOICE = {"context": "Best is", "choices": ["one", "two"], "label": 0}


def written(path: Path, *rows: Any) -> Path:
    data = "\n".join(json.dumps(row) for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize(
    ("row", "kind", "question"),
    [
        (LAMBADA, "lambada", WordQuestion(context="She opened the old", word=" door")),
        (
            HELLASWAG,
            "hellaswag",
            ChoiceQuestion(
                context="Baking: A man stands in a kitchen. He Takes flour",
                choices=("and bakes. Enjoy", "and leaves ."),
                gold=1,
            ),
        ),
        (
            ARC,
            "arc",
            ChoiceQuestion(
                context="Question: What melts?\nAnswer:", choices=("Ice", "Stone", "Fire"), gold=2
            ),
        ),
        (GSM, "gsm8k", AnswerQuestion(prompt="Question: How many?\nAnswer:", answer=GSM["answer"])),
        (CHOICE, "choice", ChoiceQuestion(context="Best is", choices=("one", "two"), gold=0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_becomes_the_question_of_its_kind(row: Any, kind: str, question: Any, tmp_path: Path) -> None:
    tasks = read_tasks(written(tmp_path / "set.jsonl.gz", row, row))
    assert (tasks.name, tasks.kind, len(tasks.questions)) == ("set", kind, 2)
    assert tasks.questions[0] == question


def test_the_first_rows_are_examples_where_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "arc.jsonl", ARC, ARC | {"question": "And now?"}, ARC, ARC)
    tasks = read_tasks(path, n_shots=1, limit=2)
    assert len(tasks.questions) == 2
    first = tasks.questions[0]
    assert isinstance(first, ChoiceQuestion)
    assert first.context == "Question: What melts?\nAnswer: Fire\n\nQuestion: And now?\nAnswer:"
    assert first.continuations == (" Ice", " Stone", " Fire")
    word = read_tasks(written(tmp_path / "l.jsonl", LAMBADA, LAMBADA), n_shots=1).questions[0]
    assert word == WordQuestion(context="She opened the old door\n\nShe opened the old", word=" door")
    answer = read_tasks(written(tmp_path / "g.jsonl", GSM, GSM), n_shots=1).questions[0]
    assert isinstance(answer, AnswerQuestion)
    assert answer.prompt.startswith(f"Question: How many?\nAnswer: {GSM['answer']}\n\nQuestion: How many?")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"a": 1}], "have the keys a, which are of no known task"),
        ([[1]], "row 1 of .* is not a JSON object"),
        ([ARC, {"question": "x"}], "row 2 of .* is not of the kind arc"),
        ([ARC | {"answerKey": "Z"}], "row 1 of .* is not of the kind arc"),
        ([CHOICE | {"label": 2}], "row 1 of .* is not of the kind choice"),
        ([CHOICE | {"choices": ["", "b"]}], "row 1 of .* is not of the kind choice"),
        ([{"text": 3}], "row 1 of .* is not of the kind lambada"),
        ([], "there is nothing to ask"),
    ],
)
def test_a_row_that_is_no_question_is_named(rows: list[Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        read_tasks(written(tmp_path / "set.jsonl", *rows))


def test_a_file_that_is_absent_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_tasks(tmp_path / "absent.jsonl")
    (tmp_path / "bad.jsonl.xz").write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="damaged or not UTF-8"):
        read_tasks(tmp_path / "bad.jsonl.xz")


@pytest.mark.parametrize(
    ("written", "strict", "flexible"),
    [
        (" It is two.\n#### 1004", 1, 1),
        (" #### 1,004 and then #### 7", 1, 0),
        (" So the answer is $1,004.", 0, 1),
        (" 1004 or 5", 0, 0),
        (" none", 0, 0),
        ("", 0, 0),
        (" #### 1004.", 1, 1),
    ],
)
def test_an_answer_counts_by_its_number(written: str, strict: int, flexible: int) -> None:
    question = AnswerQuestion(prompt="", answer=GSM["answer"])
    assert score_answer(question, written) == {
        "exact_match_strict": strict,
        "exact_match_flexible": flexible,
    }


def test_every_answer_of_the_test_set_is_right_by_itself() -> None:
    if not GSM8K.exists():
        pytest.skip("the shared task sets are not here")
    tasks = read_tasks(GSM8K)
    assert len(tasks.questions) == 1319
    for question in tasks.questions:
        assert isinstance(question, AnswerQuestion)
        assert score_answer(question, f" {question.answer}")["exact_match_strict"] == 1


def test_scores_add_up_to_means_and_their_intervals(tmp_path: Path) -> None:
    tasks = read_tasks(written(tmp_path / "set.jsonl", ARC, ARC, ARC, ARC))
    won = [Likelihood(logprob=value, is_greedy=False) for value in (-9.0, -9.0, -1.0)]
    by_length = [
        Likelihood(logprob=value, is_greedy=False) for value in (-3.0, -5.0, -4.0)
    ]  # 1, 1, 1 a letter
    scores = collected(tasks, [won, won, won, by_length])
    assert [row["acc"] for row in scores.rows] == [1, 1, 1, 0]
    assert [row["acc_norm"] for row in scores.rows] == [1, 1, 1, 0]
    acc = scores.summary()["acc"]
    deviation = math.sqrt(0.75 * 0.25 * 4 / 3)  # of the sample
    assert acc.value == 0.75 and acc.value - acc.low == pytest.approx(1.959964 * deviation / 2, rel=1e-6)
    assert acc.high == 1, "no share is larger"


def test_word_scores_make_a_perplexity() -> None:
    rows = ({"acc": 1.0, "logprob": -1.0}, {"acc": 0.0, "logprob": -3.0})
    summary = TaskScores(rows=rows).summary()
    assert summary["perplexity"].value == pytest.approx(math.exp(2.0))
    assert list(summary) == ["acc", "perplexity"]
