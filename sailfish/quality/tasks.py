"""Reads task sets from local JSON lines and turns their rows into questions, as lm_eval puts them.

Source: EleutherAI/lm-evaluation-harness, lm_eval/tasks/{lambada,hellaswag,arc,gsm8k}. Zero-shot but where
a set's first rows are asked for as examples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sailfish.base.errors import ConfigError
from sailfish.quality.text import read_lines

Kind = Literal["lambada", "hellaswag", "arc", "gsm8k", "choice"]
KINDS: Mapping[Kind, str] = {
    "lambada": "text",
    "hellaswag": "activity_label, ctx_a, ctx_b, endings, label",
    "arc": "question, choices (text, label), answerKey",
    "gsm8k": "question, answer",
    "choice": "context, choices, label",
}
"""Kind of task -> the keys of its rows."""
_EXAMPLE_BREAK = "\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceQuestion:
    """Which of some continuations is the likeliest."""

    context: str
    choices: tuple[str, ...]
    """Without the space that stands before each."""
    gold: int

    @property
    def continuations(self) -> tuple[str, ...]:
        """What is scored after the context."""
        return tuple(f" {choice}" for choice in self.choices)


@dataclass(frozen=True, slots=True, kw_only=True)
class WordQuestion:
    """How likely the last word of a text is, and whether it is the likeliest."""

    context: str
    word: str
    """With the space before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerQuestion:
    """What the model writes, of which the answer is then taken."""

    prompt: str
    answer: str
    """The reference, reasoning included."""
    until: tuple[str, ...] = ("Question:", "</s>", "<|im_end|>")
    """Texts that end the model's answer."""
    max_tokens: int = 256


Question = ChoiceQuestion | WordQuestion | AnswerQuestion


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSet:
    """Questions of one kind."""

    name: str
    """The file's name, without its endings."""
    kind: Kind
    n_shots: int
    questions: tuple[Question, ...]


def read_tasks(path: Path, *, n_shots: int = 0, limit: int | None = None) -> TaskSet:
    """Return the questions of a file: JSON lines, compressed or not, whose first row tells their kind.

    The first `n_shots` rows become examples before each question and are not asked; at most `limit` of the
    others are. Raises ConfigError naming the first row that is not of its kind.
    """
    needed = None if limit is None else n_shots + limit
    rows = [_row(line, path, number) for number, line in enumerate(read_lines(path, needed), 1)]
    if len(rows) <= n_shots:
        raise ConfigError(
            f"{path} has {len(rows)} rows, {n_shots} of them examples: there is nothing to ask",
            hint="ask for fewer examples",
            param="tasks",
        )
    kind = _kind(rows[0], path)
    built = []
    for number, row in enumerate(rows, 1):
        try:
            built.append(_BUILDERS[kind](row))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            raise ConfigError(
                f"row {number} of {path} is not of the kind {kind}",
                hint=f"it needs {KINDS[kind]}",
                param="tasks",
            ) from None
    shots = "".join(f"{_told(question)}{_EXAMPLE_BREAK}" for question in built[:n_shots])
    return TaskSet(
        name=path.name.split(".")[0],
        kind=kind,
        n_shots=n_shots,
        questions=tuple(_after(shots, question) for question in built[n_shots:]),
    )


def _row(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ConfigError(f"row {number} of {path} is not a JSON object", param="tasks")
    return row


def _kind(row: Mapping[str, Any], path: Path) -> Kind:
    for kind in ("hellaswag", "arc", "gsm8k", "choice", "lambada"):
        if all(key in row for key in re.sub(r" \(.*?\)", "", KINDS[kind]).split(", ")):
            return kind
    known = "; ".join(f"{kind}: {keys}" for kind, keys in KINDS.items())
    raise ConfigError(
        f"the rows of {path} have the keys {', '.join(sorted(row))[:100]}, which are of no known task",
        hint=f"known are {known}",
        param="tasks",
    )


def _lambada(row: Mapping[str, Any]) -> Question:
    *words, last = _text(row["text"]).split(" ")
    return WordQuestion(context=" ".join(words), word=f" {last}")


def _hellaswag(row: Mapping[str, Any]) -> Question:
    context = f"{row['ctx_a']} {_text(row['ctx_b']).capitalize()}"
    endings = [_hellaswag_text(_text(ending)) for ending in row["endings"]]
    return _choice(_hellaswag_text(f"{row['activity_label']}: {context}"), endings, int(row["label"]))


def _hellaswag_text(text: str) -> str:
    """Return the text without WikiHow's marks, as the set's authors take them out."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _arc(row: Mapping[str, Any]) -> Question:
    choices = row["choices"]
    gold = choices["label"].index(row["answerKey"])
    return _choice(f"Question: {_text(row['question'])}\nAnswer:", choices["text"], gold)


def _gsm8k(row: Mapping[str, Any]) -> Question:
    return AnswerQuestion(prompt=f"Question: {_text(row['question'])}\nAnswer:", answer=_text(row["answer"]))


def _generic(row: Mapping[str, Any]) -> Question:
    return _choice(_text(row["context"]), row["choices"], int(row["label"]))


_BUILDERS: Mapping[Kind, Callable[[Mapping[str, Any]], Question]] = {
    "lambada": _lambada,
    "hellaswag": _hellaswag,
    "arc": _arc,
    "gsm8k": _gsm8k,
    "choice": _generic,
}


def _choice(context: str, choices: Sequence[str], gold: int) -> ChoiceQuestion:
    texts = tuple(_text(choice) for choice in choices)
    if not 0 <= gold < len(texts) or not all(texts):
        raise ValueError("the label names no choice")
    return ChoiceQuestion(context=context, choices=texts, gold=gold)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _told(question: Question) -> str:
    """Return a question with its answer, as an example."""
    match question:
        case ChoiceQuestion():
            return question.context + question.continuations[question.gold]
        case WordQuestion():
            return question.context + question.word
        case AnswerQuestion():
            return f"{question.prompt} {question.answer}"


def _after(shots: str, question: Question) -> Question:
    match question:
        case ChoiceQuestion(context=context, choices=choices, gold=gold):
            return ChoiceQuestion(context=shots + context, choices=choices, gold=gold)
        case WordQuestion(context=context, word=word):
            return WordQuestion(context=shots + context, word=word)
        case AnswerQuestion(prompt=prompt, answer=answer):
            return AnswerQuestion(prompt=shots + prompt, answer=answer)
