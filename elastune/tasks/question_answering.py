"""Tasks of the question-answering head: the answer is a piece of the context, or is not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elastune.errors import BadData, BadRecipe
from elastune.json_text import parse_json
from elastune.metrics import EXACT_MATCH, TOKEN_F1, Metric
from elastune.tasks.base import Kind, QuestionAnsweringExample, Task, TaskContext
from elastune.tasks.prompts import refuse_template
from elastune.tasks.sources import Row

ROLES = ("id", "question", "context", "answers")


class QuestionAnsweringTask(Task):
    """Find the answer's first and last token; long contexts are read in overlapping windows.

    Args:
        max_length: tokens of a window: question, context and special tokens.
        stride: tokens of context that neighbouring windows share.
        n_best: starts and ends that are combined in a window.
        max_answer_length: tokens of the longest answer.
        no_answer_threshold: no answer is given when the score of none exceeds that of the best
            answer by more than this (logits); only where questions may lack an answer.

    Attributes:
        has_unanswerable: whether the context may lack the answer.
    """

    kind: Kind = "question-answering"
    metrics: tuple[Metric, ...] = (TOKEN_F1, EXACT_MATCH)
    default_template = "none"
    has_unanswerable: bool = False

    def __init__(
        self,
        context: TaskContext,
        *,
        max_length: int = 384,
        stride: int = 128,
        n_best: int = 20,
        max_answer_length: int = 30,
        no_answer_threshold: float = 0.0,
    ) -> None:
        super().__init__(context)
        refuse_template(context.template, context.argument or self.name)
        if max_length < 8 or not 0 <= stride < max_length:
            raise BadRecipe(
                f"max_length is {max_length} and stride {stride}; max_length must be at least 8 "
                "tokens, stride at least 0 and below it."
            )
        if n_best < 1 or max_answer_length < 1:
            raise BadRecipe(
                f"n_best is {n_best} and max_answer_length {max_answer_length}; both must be at "
                "least 1."
            )
        self.max_length, self.stride = max_length, stride
        self.n_best, self.max_answer_length = n_best, max_answer_length
        self.no_answer_threshold = no_answer_threshold

    def from_row(
        self, row: Row, fields: Mapping[str, str] | None = None
    ) -> QuestionAnsweringExample:
        """Return the example of a row of SQuAD's shape.

        Args:
            fields: role (id, question, context, answers) -> the row's own name of it.

        Raises:
            BadData: a field is missing, an answer is not in the context, or there is none though
                every question of the task has one.
        """
        names = dict(zip(ROLES, ROLES, strict=True)) | dict(fields or {})
        question, context = row.text(names["question"]), row.text(names["context"])
        answers, starts = _answers(row, names["answers"], context)
        if not answers and not self.has_unanswerable:
            raise BadData(
                f"{row.place}: field {names['answers']!r} holds no answer, and every question of "
                f"task {self.name!r} has one.",
                try_="use squad_v2, or the option `unanswerable: true` of extractive_qa",
            )
        return QuestionAnsweringExample(
            id=row.text(names["id"]) if names["id"] in row.values else row.place,
            question=question,
            context=context,
            answers=answers,
            answer_start=starts,
            key=f"{question}\n{context}",
        )


def _answers(row: Row, field: str, context: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return gold answers and where they start, put right where the row has it wrong."""
    texts, starts = _spelled(row.get(field), row, field)
    found = []
    for text, start in zip(texts, starts, strict=True):
        if not text:
            raise BadData(
                f"{row.place}: an answer in field {field!r} is empty.",
                try_="leave empty answers out; an empty list means that there is none",
            )
        if start is None or context[start : start + len(text)] != text:
            start = context.find(text)
        if start < 0:
            raise BadData(
                f"{row.place}: the answer {text!r} does not occur in the context.",
                try_="answers word by word as in the context, or rows without answer for SQuAD 2.0",
            )
        found.append(start)
    return tuple(texts), tuple(found)


def _spelled(value: Any, row: Row, field: str) -> tuple[list[str], list[int | None]]:
    """Read {text: [...], answer_start: [...]}, a list of {text, answer_start}, or plain texts."""
    if isinstance(value, str):  # all that a table's cell can be
        value = _structure(value)
    if isinstance(value, dict):
        texts = value.get("text")
        starts = value.get("answer_start")
        starts = [None] * len(texts) if starts is None and isinstance(texts, list) else starts
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        texts = [item.get("text") for item in value]
        starts = [item.get("answer_start") for item in value]
    else:
        texts, starts = value, [None] * len(value) if isinstance(value, list) else None
    if _are(str, texts) and _are(int | None, starts) and len(texts) == len(starts):  # type: ignore[arg-type]
        return list(texts), list(starts)  # type: ignore[arg-type]
    raise BadData(
        f"{row.place}: field {field!r} is {value!r}; allowed: "
        "{text: [...], answer_start: [...]}, a list of {text, answer_start}, or the answers' texts."
    )


def _structure(cell: str) -> Any:
    """Return the object or list that a cell spells in JSON, else its text as the one answer."""
    if cell.startswith(("{", '["', "[{")) or cell == "[]":
        try:
            return parse_json(cell)
        except ValueError:
            pass
    return [cell] if cell else []


def _are(kind: Any, values: Any) -> bool:
    return isinstance(values, Sequence) and all(isinstance(value, kind) for value in values)
