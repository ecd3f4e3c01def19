"""The rows of metrics.json as systems side by side, and whether they differ beyond noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from elastune.report.load import check_metrics
from elastune.report.quantities import score_text

BASELINES = ("dense", "dense+lora", "lora", "sparse", "sparse+lora")
RESULTS = ("largest", "heuristic", "smallest", "best")
ORDER = BASELINES + RESULTS
REFERENCES = ("sparse+lora", "dense+lora", "lora")  # what a sub-network must beat, first found
LOWER_IS_BETTER = frozenset({"perplexity", "loss", "nll"})
PERCENT = frozenset({"accuracy", "exact_match", "f1"})
FEW_EXAMPLES = 30  # below this the normal approximation of a proportion means little


@dataclass(frozen=True, order=True)
class Column:
    """One measured quantity: a metric of a task, or the average over the accuracy tasks."""

    task: str
    metric: str

    @property
    def percent(self) -> bool:
        """Whether values are fractions shown as per cent."""
        return self.metric in PERCENT

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value is the better one."""
        return self.metric not in LOWER_IS_BETTER

    def text(self, value: Value) -> str:
        """Format a score of this column, without its error."""
        return score_text(value.score, percent=self.percent)

    def error_text(self, value: Value) -> str:
        """Format the standard error with the digits of its score; empty where there is none."""
        if value.stderr is None:
            return ""
        return score_text(value.stderr, percent=self.percent, beside=value.score)

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
    """One row of the main table: scores by column, and what the system costs."""

    name: str
    values: Mapping[Column, Value]
    params: int
    nonzero: int
    macs: int
    latency_ms: float | None
    seconds: float
    config: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def baseline(self) -> bool:
        """Whether this is a baseline rather than a sub-network of the super-network."""
        return self.name in BASELINES


@dataclass(frozen=True)
class Verdict:
    """How a system compares with a reference.

    ``word`` is ``better``, ``worse``, ``within noise`` or ``unknown`` (no standard error).
    """

    name: str
    reference: str
    column: Column
    difference: float
    noise: float | None
    n: int
    word: str


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
    names = sorted(groups, key=lambda name: rank.get(name, len(ORDER)))
    return [_system(name, groups[name]) for name in names]


def _system(name: str, rows: Sequence[Mapping[str, Any]]) -> System:
    values = {
        Column(row["task"], row["metric"]): Value(row["score"], row["stderr"], row["n"])
        for row in rows
    }
    first = rows[0]
    latencies = [row["latency_ms"] for row in rows if row.get("latency_ms") is not None]
    configs = [row["config"] for row in rows if row.get("config")]
    return System(
        name=name,
        values=values,
        params=first["params"],
        nonzero=first["nonzero"],
        macs=first["macs"],
        latency_ms=latencies[0] if latencies else None,
        seconds=sum(row["seconds"] for row in rows),
        config=configs[0] if configs else None,
    )


def columns(rows: Sequence[System]) -> list[Column]:
    """List the measured columns in order of appearance."""
    return list(dict.fromkeys(column for row in rows for column in row.values))


def with_average(rows: Sequence[System]) -> list[System]:
    """Add the average over the accuracy tasks where there are several.

    A system that lacks one of the tasks gets none, since its average would not compare. The
    standard error takes the tasks as independent: ``sqrt(sum(se_i^2)) / k``.
    """
    tasks = [column for column in columns(rows) if column.metric == "accuracy"]
    if len(tasks) < 2:
        return list(rows)
    return [_add_average(row, tasks) for row in rows]


def _add_average(row: System, tasks: Sequence[Column]) -> System:
    if not all(task in row.values for task in tasks):
        return row
    parts = [row.values[task] for task in tasks]
    errors = [part.stderr for part in parts if part.stderr is not None]
    complete = len(errors) == len(parts)
    stderr = math.sqrt(sum(e * e for e in errors)) / len(parts) if complete else None
    mean = Value(sum(p.score for p in parts) / len(parts), stderr, min(p.n for p in parts))
    return System(**{**row.__dict__, "values": {**row.values, AVERAGE: mean}})


def best_names(rows: Sequence[System], column: Column) -> set[str]:
    """Name the sub-networks (no baselines) with the best score in ``column``.

    None where all of several tie: then no one stands out.
    """
    scores = {
        row.name: row.values[column].score
        for row in rows
        if not row.baseline and column in row.values and math.isfinite(row.values[column].score)
    }
    if not scores:
        return set()
    top = max(scores.values()) if column.higher_is_better else min(scores.values())
    names = {name for name, score in scores.items() if score == top}
    return names if len(names) < len(scores) or len(scores) == 1 else set()


def reference(rows: Sequence[System]) -> System | None:
    """Find the baseline that sub-networks are compared with: sparse+lora, else dense+lora."""
    named = {row.name: row for row in rows}
    return next((named[name] for name in REFERENCES if name in named), None)


def verdicts(rows: Sequence[System]) -> list[Verdict]:
    """Compare every sub-network with the reference baseline, column by column.

    A difference counts when it exceeds ``2 * sqrt(se1^2 + se2^2)``, about a 95 % interval for two
    independent samples. Both systems answer the same questions, so the test errs on the side of
    "within noise".
    """
    against = reference(rows)
    if against is None:
        return []
    return [
        compare(row, against, column)
        for row in rows
        if not row.baseline
        for column in row.values
        if column in against.values
    ]


def compare(row: System, against: System, column: Column) -> Verdict:
    """Say whether ``row`` differs from ``against`` in ``column`` beyond noise."""
    ours, theirs = row.values[column], against.values[column]
    difference = ours.score - theirs.score
    noise = None
    if ours.stderr is not None and theirs.stderr is not None:
        noise = 2 * math.hypot(ours.stderr, theirs.stderr)
    if noise is None or not math.isfinite(difference) or not math.isfinite(noise):
        word, noise = "unknown", None
    elif abs(difference) <= noise:
        word = "within noise"
    else:
        word = "better" if (difference > 0) == column.higher_is_better else "worse"
    n = min(ours.n, theirs.n)
    return Verdict(row.name, against.name, column, difference, noise, n, word)
