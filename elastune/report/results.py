"""The rows of metrics.json as systems side by side, and whether they differ beyond noise."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from elastune.metrics import METRICS, Metric
from elastune.report.load import check_metrics
from elastune.report.quantities import score_text, signed

UNTRAINED = ("dense", "sparse")
BASELINES = (
    *("dense", "dense+full", "dense+lora", "lora"),
    *("sparse", "sparse+lora"),
)
ALONE = "alone-"
"""Begins the names of sub-networks that were trained by themselves."""
FRONT = "front-"
"""Begins the names of sub-networks that were scored for being on the Pareto front of a search."""
RANDOM_BEST = "random-best"
"""The best of a few random sub-networks, scored as what luck alone finds."""
RESULTS = ("largest", "heuristic", "smallest", RANDOM_BEST, "best")
ORDER = BASELINES + RESULTS
# What a sub-network must beat, first found.
REFERENCES = ("sparse+lora", "dense+lora", "lora", "dense+full")
# Words in the names of metrics not in METRICS (lm-eval's) of which less is better.
LOWER_IS_BETTER = frozenset({"perplexity", "loss", "nll", "bits", "brier", "wer", "ter"})
HARNESS = "lm-eval:"
FEW_EXAMPLES = 30  # below this the normal approximation of a proportion means little


@dataclass(frozen=True, order=True)
class Column:
    """One measured quantity: a metric of a task, or the average over the accuracy tasks."""

    task: str
    metric: str

    @property
    def known(self) -> Metric | None:
        """The metric, where it is one of this library; lm-eval may name a filter behind it."""
        return METRICS.get(self.metric.partition(" (")[0])

    @property
    def title(self) -> str:
        """The metric's name in words."""
        return self.metric.replace("_", " ").replace("f1", "F1")

    @property
    def percent(self) -> bool:
        """Whether values are fractions shown as per cent."""
        return self.known is not None and self.known.unit == "fraction"

    @property
    def decimals(self) -> int | None:
        """How many decimals values have; None leaves it to their size."""
        return 3 if self.known is not None and self.known.unit == "correlation" else None

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value is the better one."""
        if self.known is not None:
            return self.known.higher_is_better
        return not LOWER_IS_BETTER & set(re.split("[^a-z]+", self.metric.lower()))

    def number(self, score: float, beside: float | None = None) -> str:
        """Format a number in this column's unit; ``beside`` sets the digits."""
        return score_text(score, percent=self.percent, beside=beside, decimals=self.decimals)

    def difference(self, score: float, beside: float | None = None) -> str:
        """Format a difference with its sign."""
        return signed(score, percent=self.percent, beside=beside, decimals=self.decimals)

    def text(self, value: Value) -> str:
        """Format a score of this column, without its error."""
        return self.number(value.score)

    def error_text(self, value: Value) -> str:
        """Format the standard error with the digits of its score; empty where there is none."""
        return "" if value.stderr is None else self.number(value.stderr, value.score)

    def full_text(self, value: Value) -> str:
        """Format score ± standard error."""
        error = self.error_text(value)
        return f"{self.text(value)} ± {error}" if error else self.text(value)


AVERAGE = Column("average", "accuracy")


@dataclass(frozen=True)
class Value:
    """A score in its own unit (accuracy: a fraction), its standard error and its sample size."""

    score: float
    stderr: float | None
    n: int


@dataclass(frozen=True)
class System:
    """One row of the main table: scores by column, and what the system costs.

    ``first`` are the columns of the tasks' first metrics.
    """

    name: str
    values: Mapping[Column, Value]
    first: tuple[Column, ...]
    params: int
    nonzero: int
    macs: int
    latency_ms: float | None
    decode_latency_ms: float | None
    seconds: float
    config: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def baseline(self) -> bool:
        """Whether this is a baseline rather than a sub-network of the super-network."""
        return self.name in BASELINES or self.name.startswith(ALONE)

    @property
    def on_front(self) -> bool:
        """Whether this is only scored for being on the front of the search."""
        return self.name.startswith(FRONT)

    @property
    def trained(self) -> bool:
        """Whether this is more than the model as it came, or as it was pruned."""
        return self.name not in UNTRAINED


def systems(metrics: Mapping[str, Any]) -> list[System]:
    """Gather the rows of ``metrics`` by name, baselines first, in the usual order.

    Costs are those of a name's first row; ``seconds`` adds up over its tasks.

    Raises:
        BadArtifact: a row lacks a field or is there twice.
    """
    check_metrics(metrics)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in metrics["rows"]:
        groups.setdefault(row["name"], []).append(row)
    rank = {name: place for place, name in enumerate(ORDER)}
    names = sorted(groups, key=lambda name: rank.get(name, _after_the_named(name)))
    return [_system(name, groups[name]) for name in names]


def _after_the_named(name: str) -> float:
    """Sizes trained alone stand behind the other baselines, sub-networks at the end."""
    return len(BASELINES) - 0.5 if name.startswith(ALONE) else len(ORDER)


def _system(name: str, rows: Sequence[Mapping[str, Any]]) -> System:
    values = {
        Column(row["task"], part["metric"]): _value(part)
        for row in rows
        for part in (row, *(row.get("other_metrics") or ()))
    }
    first = rows[0]
    configs = [row["config"] for row in rows if row.get("config")]
    return System(
        name=name,
        values=values,
        first=tuple(Column(row["task"], row["metric"]) for row in rows),
        params=first["params"],
        nonzero=first["nonzero"],
        macs=first["macs"],
        latency_ms=_first(rows, "latency_ms"),
        decode_latency_ms=_first(rows, "decode_latency_ms"),
        seconds=sum(row["seconds"] for row in rows),
        config=configs[0] if configs else None,
    )


def _first(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the first value that rows have of an optional field."""
    return next((row[name] for row in rows if row.get(name) is not None), None)


def _value(part: Mapping[str, Any]) -> Value:
    stderr = part["stderr"]
    known = stderr is not None and math.isfinite(stderr)
    return Value(part["score"], stderr if known else None, part["n"])


def columns(rows: Sequence[System]) -> list[Column]:
    """List the measured columns in order of appearance."""
    return list(dict.fromkeys(column for row in rows for column in row.values))


def first_columns(rows: Sequence[System]) -> list[Column]:
    """List the columns of the tasks' first metrics, and the average if there is one."""
    found = list(dict.fromkeys(column for row in rows for column in row.first))
    return found + [AVERAGE] * any(AVERAGE in row.values for row in rows)


def footnotes(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return what rows note of their tasks."""
    return {row["task"]: row["notes"] for row in metrics["rows"] if row.get("notes")}


def with_average(rows: Sequence[System]) -> list[System]:
    """Add the average over the tasks whose first metric is accuracy, where there are several.

    A system that lacks one of the tasks gets none, since its average would not compare. The
    standard error takes the tasks as independent: ``sqrt(sum(se_i^2)) / k``. Tasks of lm-eval are
    left out: they may be the run's own tasks, worded otherwise.
    """
    tasks = averaged(rows)
    if len(tasks) < 2:
        return list(rows)
    return [_add_average(row, tasks) for row in rows]


def averaged(rows: Sequence[System]) -> list[Column]:
    """List the columns that the average is over."""
    return [
        column
        for column in first_columns(rows)
        if column.metric == "accuracy" and column != AVERAGE and not column.task.startswith(HARNESS)
    ]


def _add_average(row: System, tasks: Sequence[Column]) -> System:
    if not all(task in row.values for task in tasks):
        return row
    parts = [row.values[task] for task in tasks]
    errors = [part.stderr for part in parts if part.stderr is not None]
    complete = len(errors) == len(parts)
    stderr = math.sqrt(sum(e * e for e in errors)) / len(parts) if complete else None
    mean = Value(sum(p.score for p in parts) / len(parts), stderr, min(p.n for p in parts))
    return System(**{**row.__dict__, "values": {**row.values, AVERAGE: mean}})


def contenders(rows: Sequence[System]) -> list[System]:
    """Return the sub-networks; of a run that has baselines alone, those."""
    return [row for row in rows if not row.baseline] or list(rows)


def best_names(rows: Sequence[System], column: Column) -> set[str]:
    """Name the sub-networks with the best score in ``column``; of baselines alone, any of them.

    None where all of several tie: then no one stands out.
    """
    scores = {
        row.name: row.values[column].score
        for row in contenders(rows)
        if column in row.values and math.isfinite(row.values[column].score)
    }
    if not scores:
        return set()
    top = max(scores.values()) if column.higher_is_better else min(scores.values())
    names = {name for name, score in scores.items() if score == top}
    alone = len(scores) == 1 and any(not row.baseline for row in rows)
    return names if len(names) < len(scores) or alone else set()
