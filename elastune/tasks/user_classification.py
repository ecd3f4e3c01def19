"""A user's own texts with a class or a number each.

task: {name: "classification:reviews.csv", options: {fields: {text: review, label: stars}}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from elastune.errors import BadData, BadRecipe
from elastune.metrics import ACCURACY, F1, MATTHEWS, PEARSON, SPEARMAN
from elastune.tasks.base import ClassificationExample, TaskContext
from elastune.tasks.classification import (
    ClassificationTask,
    RegressionTask,
    labelled,
    number_of,
)
from elastune.tasks.sources import Row
from elastune.tasks.user_data import UserData, chosen_metrics

ROLES = ("text", "text_pair", "label")
MANY_LABELS = 50


class UserClassification(ClassificationTask):
    """``classification:SRC``: rows of ``text`` (and ``text_pair``) with a ``label``.

    Args:
        labels: names of the classes by number (rows hold either), or label -> name. By default
            the labels that occur in the rows, sorted.
        metrics: of accuracy, f1 and matthews (the last two: of two classes); first what a search
            optimises. By default accuracy.
        fields, report, holdout, split, subset: see `elastune.tasks.user_data.UserData`.
    """

    name = "classification"

    def __init__(
        self,
        context: TaskContext,
        *,
        fields: Mapping[str, str] | None = None,
        labels: Sequence[str] | Mapping[str, str] | None = None,
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
            ROLES,
            self._from_row,
            fields=fields,
            report=report,
            holdout=holdout,
            split=split,
            subset=subset,
        )
        self.name, self._field = self.data.name, self.data.names["label"]
        self.metrics = chosen_metrics(metrics or ACCURACY.name, (ACCURACY, F1, MATTHEWS))
        self._given = labels
        if labels is not None:
            self._check()

    def train_examples(self) -> list[ClassificationExample]:
        self._check()
        return self.data.train()

    def report_examples(self) -> list[ClassificationExample]:
        self._check()
        return self.data.report()

    @property
    def labels(self) -> Sequence[str]:
        """The names of the classes, by number."""
        return tuple(dict.fromkeys(self._name_of.values()))

    @cached_property
    def _name_of(self) -> dict[str, str]:
        """A label as rows spell it -> the name of its class, in the order of the classes."""
        if isinstance(self._given, Mapping):
            return {_spelling(label): str(name) for label, name in self._given.items()}
        if self._given is None:
            return {label: label for label in _found_labels(self.data.rows, self._field)}
        names = [str(name) for name in self._given]
        spelled = {name: name for name in names}
        # Among classes called 3, 4 and 5 a row's 3 is no number of a class.
        if any(name.isdigit() for name in names):
            return spelled
        return {str(i): name for i, name in enumerate(names)} | spelled

    @cached_property
    def _number_of(self) -> dict[str, int]:
        numbers = {name: i for i, name in enumerate(self.labels)}
        return {label: numbers[name] for label, name in self._name_of.items()}

    def _check(self) -> None:
        labels = self.labels
        if len(labels) < 2:
            raise BadData(
                f"task {self.name!r} has the label {', '.join(labels) or 'none'} alone; "
                "a classification needs two classes or more.",
                try_="name the field of the labels: fields: {label: ...}",
            )
        two_class = [metric.name for metric in self.metrics if metric in (F1, MATTHEWS)]
        if two_class and len(labels) > 2:
            raise BadRecipe(
                f"metric {two_class[0]} is for two classes; task {self.name!r} has {len(labels)}: "
                f"{', '.join(labels[:10])}.",
                try_="metrics: accuracy",
            )

    def _from_row(self, row: Row) -> ClassificationExample:
        label = _label(row, self._field)
        if label not in self._number_of:
            known = ", ".join(map(repr, self._number_of))
            raise BadData(f"{row.place}: label {label!r} is not known; labels known: {known}.")
        return _example(row, self.data.names, self._number_of[label])


class UserRegression(RegressionTask):
    """``regression:SRC``: rows of ``text`` (and ``text_pair``) with a number as ``label``.

    Args:
        metrics: of pearson and spearman; by default both.
        fields, report, holdout, split, subset: see `elastune.tasks.user_data.UserData`.
    """

    name = "regression"

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
            ROLES,
            self._from_row,
            fields=fields,
            report=report,
            holdout=holdout,
            split=split,
            subset=subset,
        )
        self.name = self.data.name
        self.metrics = chosen_metrics(metrics, (PEARSON, SPEARMAN))

    def train_examples(self) -> list[ClassificationExample]:
        return self.data.train()

    def report_examples(self) -> list[ClassificationExample]:
        return self.data.report()

    def _from_row(self, row: Row) -> ClassificationExample:
        names = self.data.names
        return _example(row, names, number_of(row, names["label"]))


def _example(row: Row, names: Mapping[str, str], label: float) -> ClassificationExample:
    pair = names["text_pair"]
    has_pair = pair in row.values or pair != "text_pair"
    return labelled(row.text(names["text"]), row.text(pair) if has_pair else None, label)


def _label(row: Row, field: str) -> str:
    value = row.get(field)
    if value is None or value == "" or not isinstance(value, str | int | float):
        raise BadData(f"{row.place}: field {field!r} is {value!r}; it must be a label.")
    return _spelling(value)


def _spelling(label: Any) -> str:
    """Return a label as text: 1.0 is 1, and true is JSON's."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label).strip()


def _found_labels(rows: Sequence[Row], field: str) -> list[str]:
    """Return the labels that occur, sorted; as numbers when all are whole numbers."""
    found = {_label(row, field) for row in rows}
    if len(found) > max(MANY_LABELS, len(rows) // 2):
        raise BadData(
            f"field {field!r} has {len(found)} different labels in {len(rows)} rows.",
            try_="use regression:SRC for numbers, or list the classes with the option `labels`",
        )
    try:
        return sorted(found, key=int)
    except ValueError:
        return sorted(found)
