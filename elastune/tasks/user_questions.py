"""A user's own questions: with choices, or answered by a part of a text.

task: {name: "multiple_choice:quiz.jsonl", options: {fields: {gold: answer}}, template: qa}
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from elastune.errors import BadData
from elastune.json_text import parse_json
from elastune.metrics import ACCURACY, ACCURACY_NORM, Metric
from elastune.tasks.base import (
    Kind,
    MultipleChoiceExample,
    QuestionAnsweringExample,
    Task,
    TaskContext,
)
from elastune.tasks.question_answering import ROLES as QA_ROLES
from elastune.tasks.question_answering import QuestionAnsweringTask
from elastune.tasks.sources import Row
from elastune.tasks.user_data import UserData, chosen_metrics

CHOICE_ROLES = ("prompt", "choices", "gold")


class UserMultipleChoice(Task):
    """``multiple_choice:SRC``: rows of ``prompt``, ``choices`` and ``gold``.

    The choice with the highest log-likelihood after the prompt is taken. ``choices`` is a list (in
    a table: in JSON), or texts with their labels as {text: [...], label: [...]}; ``gold`` is the
    number of the right one (from 0), its letter (A, B, ...), its label or its text.

    Args:
        metrics: of accuracy and accuracy_norm (by the choice's length); by default both.
        fields, report, holdout, split, subset: see `elastune.tasks.user_data.UserData`.
    """

    name = "multiple_choice"
    kind: Kind = "multiple-choice"
    metrics: tuple[Metric, ...] = (ACCURACY, ACCURACY_NORM)
    default_template = "none"

    def __init__(
        self,
        context: TaskContext,
        *,
        fields: Mapping[str, str] | None = None,
        metrics: str | Sequence[str] | None = None,
        report: str | None = None,
        holdout: float = 0.1,
        split: str = "train",
        subset: str | None = None,
    ) -> None:
        super().__init__(context)
        self.data = UserData(
            self.name,
            context,
            CHOICE_ROLES,
            self._from_row,
            fields=fields,
            report=report,
            holdout=holdout,
            split=split,
            subset=subset,
        )
        self.name = self.data.name
        self.metrics = chosen_metrics(metrics, self.metrics)

    def train_examples(self) -> list[MultipleChoiceExample]:
        return self.data.train()

    def report_examples(self) -> list[MultipleChoiceExample]:
        return self.data.report()

    def _from_row(self, row: Row) -> MultipleChoiceExample:
        names = self.data.names
        question = row.text(names["prompt"])
        choices, labels = _choices(row, names["choices"])
        gold = _gold(row, names["gold"], choices, labels)
        prompt = self.template.prompt(question)
        # A choice is a word of its own, unless prompt or choice see to that themselves.
        spaced = tuple(
            choice if prompt[-1:].isspace() or choice[:1].isspace() else f" {choice}"
            for choice in choices
        )
        return MultipleChoiceExample(prompt, spaced, gold, "\n".join((question, *choices)))


class UserExtractiveQA(QuestionAnsweringTask):
    """``extractive_qa:SRC``: rows of ``question``, ``context`` and ``answers`` as SQuAD has them.

    ``answers`` may also be one text or a list of texts: each is looked up in the context.

    Args:
        unanswerable: whether rows may have no answer (as in SQuAD 2.0).
        metrics: of token_f1 and exact_match; by default both.
        window: `elastune.tasks.question_answering.QuestionAnsweringTask`'s options.
        fields, report, holdout, split, subset: see `elastune.tasks.user_data.UserData`.
    """

    name = "extractive_qa"

    def __init__(
        self,
        context: TaskContext,
        *,
        unanswerable: bool = False,
        fields: Mapping[str, str] | None = None,
        metrics: str | Sequence[str] | None = None,
        report: str | None = None,
        holdout: float = 0.1,
        split: str = "train",
        subset: str | None = None,
        max_length: int = 384,
        stride: int = 128,
        n_best: int = 20,
        max_answer_length: int = 30,
        no_answer_threshold: float = 0.0,
    ) -> None:
        super().__init__(
            context,
            max_length=max_length,
            stride=stride,
            n_best=n_best,
            max_answer_length=max_answer_length,
            no_answer_threshold=no_answer_threshold,
        )
        self.data = UserData(
            self.name,
            context,
            QA_ROLES,
            lambda row: self.from_row(row, self.data.names),
            fields=fields,
            report=report,
            holdout=holdout,
            split=split,
            subset=subset,
        )
        self.name = self.data.name
        self.has_unanswerable = unanswerable
        self.metrics = chosen_metrics(metrics, self.metrics)

    def train_examples(self) -> list[QuestionAnsweringExample]:
        return self.data.train()

    def report_examples(self) -> list[QuestionAnsweringExample]:
        return self.data.report()


def _choices(row: Row, field: str) -> tuple[list[str], list[str]]:
    """Return the choices' texts and, where the row names them, their labels."""
    value: Any = row.get(field)
    if isinstance(value, str):  # all that a table's cell can be
        try:
            value = parse_json(value)
        except ValueError:
            value = None
    labels: Any = []
    if isinstance(value, dict):
        value, labels = value.get("text"), value.get("label", [])
    if not (isinstance(value, list) and len(value) > 1 and all(map(_is_word, value))):
        raise BadData(
            f"{row.place}: field {field!r} is {row.values[field]!r}; it must be a list of two "
            'texts or more (in a table: in JSON, ["yes", "no"]).'
        )
    return [str(choice) for choice in value], [str(label) for label in labels]


def _gold(row: Row, field: str, choices: list[str], labels: list[str]) -> int:
    """Return the index of the right choice.

    Raises:
        BadData: it is none of the choices, or could be either of two.
    """
    given = row.get(field)
    if isinstance(given, int) and not isinstance(given, bool) and not labels:
        found = {given}
    else:
        word = str(given)
        found = {i for i, choice in enumerate(choices) if choice.strip() == word.strip()}
        found |= {i for i, label in enumerate(labels) if label == word}
        if not labels and word.isdecimal():
            found.add(int(word))
        if not labels and len(word) == 1 and word in string.ascii_uppercase:
            found.add(string.ascii_uppercase.index(word))
    found &= set(range(len(choices)))
    if len(found) != 1:
        raise BadData(
            f"{row.place}: field {field!r} is {given!r}; it fits {len(found)} of the "
            f"{len(choices)} choices.",
            try_="give the number of the right choice (from 0), its letter (A, B, ...) or its text",
        )
    return found.pop()


def _is_word(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""
