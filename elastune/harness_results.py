"""What lm-evaluation-harness found, as this library's scores and records."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from elastune.errors import BadRecipe
from elastune.metrics import ACCURACY, ACCURACY_NORM, EXACT_MATCH, Metric, Record
from elastune.tasks.base import Measured, Score

PREFIX = "lm-eval:"
"""What rows of these tasks are called by, before the task's own name."""
_OURS: dict[str, Metric] = {
    "acc": ACCURACY,
    "acc_norm": ACCURACY_NORM,
    "exact_match": EXACT_MATCH,
}
"""Metrics that are the same here under another name: means of what they are of each example."""


def score_of(name: str, results: Mapping[str, Any], seconds: float) -> Score:
    """Return what lm-eval found of one task or group."""
    found = results["results"][name]
    higher = results["higher_is_better"].get(name) or {}
    n = int(found["sample_len"])
    measured = []
    order = list(higher)  # of the task's metric_list
    labels = _labels(found)
    for key in sorted(labels, key=lambda key: _place(order, key.partition(",")[0])):
        metric, _, kind = key.partition(",")
        error = found.get(f"{metric}_stderr,{kind}")
        stderr = float(error) if isinstance(error, Real) else math.nan
        measured.append((Measured(labels[key], float(found[key]), stderr, n), higher.get(metric)))
    if not measured:
        raise BadRecipe(f"lm-eval task {name!r} gives no number", try_="a task with a metric_list")
    first, first_higher = measured[0]
    return Score(
        task=f"{PREFIX}{name}",
        metric=first.metric,
        value=first.value,
        stderr=first.stderr,
        n=n,
        higher_is_better=first_higher is not False,
        seconds=seconds,
        others=tuple(other for other, _ in measured[1:]),
    )


def _place(order: Sequence[str], metric: str) -> int:
    return order.index(metric) if metric in order else len(order)


def _labels(found: Mapping[str, Any]) -> dict[str, str]:
    """Return what each ``metric,filter`` of a result is called here."""
    labels: dict[str, str] = {}
    for key, value in found.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        label = _OURS[metric].name if metric in _OURS else metric
        labels[key] = label if label not in labels.values() else f"{label} ({kind})"
    return labels


def records_of(part: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[Record]:
    """Yield a record per example of a task, or of all tasks of a group, numbered through."""
    index = 0
    for name in part["tasks"]:
        labels = _labels(results["results"][name])
        of_document: dict[int, Record] = {}
        for sample in results["samples"][name]:
            record = of_document.get(sample["doc_id"])
            if record is None:
                record = {"index": index, **_asked(sample)}
                record |= {"lm_eval_task": name} if len(part["tasks"]) > 1 else {}
                of_document[sample["doc_id"]] = record
                index += 1
            for metric in sample["metrics"]:
                label = labels.get(f"{metric},{sample['filter']}")
                if label is not None:
                    record[_column(metric, label)] = _plain(sample[metric])
        yield from of_document.values()


def _asked(sample: Mapping[str, Any]) -> Record:
    """Return the question of a sample and what the model made of it."""
    arguments = sample["arguments"]
    record = {"prompt": str(arguments[0][0]), "gold": _plain(sample["target"])}
    answers = [response for responses in sample["resps"] for response in responses]
    if answers and isinstance(answers[0], str):
        return record | {"text": answers[0], "extracted": _plain(sample["filtered_resps"][0])}
    if len(arguments) > 1:
        record["choices"] = [str(given[1]) for given in arguments]
    values = [answer[0] if isinstance(answer, tuple | list) else answer for answer in answers]
    return record | {"loglikelihoods": [round(float(value), 6) for value in values]}


def _column(metric: str, label: str) -> str:
    """Return the field of a record that holds a metric, as this library's metrics read it."""
    ours = _OURS.get(metric)
    return ours.columns[0] if ours is not None and ours.name == label else label


def _plain(value: Any) -> Any:
    """Return a value as JSON knows it."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
