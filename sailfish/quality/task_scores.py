"""What a model's likelihoods and answers are worth on a task set, row by row, by lm_eval's definitions.

Source: EleutherAI/lm-evaluation-harness, lm_eval/api/{task,metrics}.py and the tasks' own files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp

import numpy as np

from sailfish.quality.intervals import Interval, normal_interval
from sailfish.quality.tasks import AnswerQuestion, ChoiceQuestion, TaskSet, WordQuestion

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")
"""Taken out of both sides before an answer is compared, in this order."""
_INVALID = "[invalid]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """What a model gave a continuation."""

    logprob: float
    """Sum over its tokens, in nats."""
    is_greedy: bool
    """Each token was the likeliest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores:
    """Every metric of a task set, row by row."""

    rows: tuple[Mapping[str, float], ...]
    """Metric -> value: 0 or 1, or for "logprob" what it says."""
    given: tuple[Sequence[Likelihood] | str, ...] = ()
    """What the model gave each question: likelihoods of its continuations, or a text."""

    def summary(self) -> dict[str, Interval]:
        """Return the mean of each metric over rows with its normal interval, cut to 0..1; two rows at least.

        "logprob" becomes "perplexity", exp of its negative mean.
        """
        found: dict[str, Interval] = {}
        for name in self.rows[0]:
            values = [np.array([row[name]], np.float64) for row in self.rows]
            if name == "logprob":
                found["perplexity"] = normal_interval([-value for value in values]).map(exp)
            else:
                mean = normal_interval(values)
                found[name] = replace(mean, low=max(0.0, mean.low), high=min(1.0, mean.high))
        return found


def score_choice(question: ChoiceQuestion, found: Sequence[Likelihood]) -> dict[str, float]:
    """Return acc, and acc_norm: the same with each likelihood divided by its choice's characters."""
    logprobs = np.array([likelihood.logprob for likelihood in found])
    lengths = np.array([float(len(choice)) for choice in question.choices])
    return {
        "acc": float(int(np.argmax(logprobs)) == question.gold),
        "acc_norm": float(int(np.argmax(logprobs / lengths)) == question.gold),
    }


def score_word(found: Likelihood) -> dict[str, float]:
    """Return acc, whether the word was the likeliest, and its log-probability."""
    return {"acc": float(found.is_greedy), "logprob": found.logprob}


def score_answer(question: AnswerQuestion, written: str) -> dict[str, float]:
    """Return exact_match of the number after "####" (strict), and of the last number (flexible)."""
    strict = _STRICT.findall(written)
    flexible = _FLEXIBLE.findall(written)
    last = next((group for group in flexible[-1] if group), _INVALID) if flexible else _INVALID
    answers = {"strict": strict[0].strip() if strict else _INVALID, "flexible": last.strip()}
    reference = _compared(question.answer)
    return {f"exact_match_{name}": float(_compared(answer) == reference) for name, answer in answers.items()}


def collected(tasks: TaskSet, found: Sequence[Sequence[Likelihood] | str]) -> TaskScores:
    """Return the scores of what a model gave each question: likelihoods of continuations, or a text."""
    rows = []
    for question, given in zip(tasks.questions, found, strict=True):
        match question:
            case ChoiceQuestion():
                assert not isinstance(given, str)
                rows.append(score_choice(question, given))
            case WordQuestion():
                assert not isinstance(given, str)
                rows.append(score_word(given[0]))
            case AnswerQuestion():
                assert isinstance(given, str)
                rows.append(score_answer(question, given))
    return TaskScores(rows=tuple(rows), given=tuple(found))


def _compared(answer: str) -> str:
    for pattern in _IGNORED:
        answer = re.sub(pattern, "", answer)
    return answer.lower()
