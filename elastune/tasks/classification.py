"""Tasks of the sequence-classification head: a class, or a number, for a text or a pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elastune.errors import BadData
from elastune.metrics import ACCURACY, PEARSON, SPEARMAN, Metric
from elastune.tasks.base import ClassificationExample, Kind, Task, TaskContext
from elastune.tasks.prompts import refuse_template
from elastune.tasks.sources import Row


class ClassificationTask(Task):
    """One of several classes for a text or a pair of texts.

    Attributes:
        labels: the names of the classes, by number.
    """

    kind: Kind = "classification"
    metrics: tuple[Metric, ...] = (ACCURACY,)
    default_template = "none"

    def __init__(self, context: TaskContext) -> None:
        super().__init__(context)
        refuse_template(context.template, context.argument or self.name)

    @property
    def labels(self) -> Sequence[str]:
        """The names of the classes, by number."""
        return ()

    @property
    def num_labels(self) -> int | None:
        return len(self.labels)


class RegressionTask(ClassificationTask):
    """A number for a text or a pair of texts."""

    kind: Kind = "regression"
    metrics: tuple[Metric, ...] = (PEARSON, SPEARMAN)

    @property
    def num_labels(self) -> int | None:
        return 1


def labelled(text: str, text_pair: str | None, label: float) -> ClassificationExample:
    """Return an example; its key holds both texts."""
    key = text if text_pair is None else f"{text}\n{text_pair}"
    return ClassificationExample(text, text_pair, label, key)


def number_of(row: Row, field: str) -> float:
    """Return ``field`` as a finite number, spelled out or not.

    Raises:
        BadData: the field is missing or is no number.
    """
    value: Any = row.get(field)
    try:
        number = float(value) if not isinstance(value, bool) else float("nan")
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf"):
        raise BadData(f"{row.place}: field {field!r} is {value!r}; it must be a number.")
    return number
