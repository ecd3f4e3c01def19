"""Whether systems of a run differ beyond noise: on the same examples where those are known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastune import statistics
from elastune.errors import BadData
from elastune.report.load import prediction_name
from elastune.report.results import REFERENCES, Column, System, first_columns

Records = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Verdict:
    """How a system compares with a reference.

    Attributes:
        word: ``better``, ``worse``, ``within noise`` or ``unknown`` (no standard error).
        noise: what a difference of unpaired scores must exceed; None where it is not known.
        paired: the comparison on the same examples, where both systems' records are there.
    """

    name: str
    reference: str
    column: Column
    difference: float
    noise: float | None
    n: int
    word: str
    paired: statistics.Comparison | None = None


def reference(rows: Sequence[System]) -> System | None:
    """Find the baseline that sub-networks are compared with: sparse+lora, else dense+lora.

    None where there are no sub-networks.
    """
    if all(row.baseline for row in rows):
        return None
    named = {row.name: row for row in rows}
    return next((named[name] for name in REFERENCES if name in named), None)


def opponents(rows: Sequence[System]) -> list[tuple[System, System]]:
    """Pair up what is compared: every named sub-network with the reference baseline.

    Members of the front are left out: so many comparisons find differences by chance. In a run
    of baselines alone, what was trained with what it started from, and then LoRA with the training
    of all weights.
    """
    against = reference(rows)
    if against is not None:
        return [(row, against) for row in rows if not row.baseline and not row.on_front]
    if any(not row.baseline for row in rows):
        return []
    named = {row.name: row for row in rows}
    pairs = [(row, named.get(row.name.partition("+")[0])) for row in rows if row.trained]
    pairs += [
        (row, named.get(row.name.replace("+lora", "+full")))
        for row in rows
        if row.name.endswith("+lora")
    ]
    return [(row, other) for row, other in pairs if other is not None]


def verdicts(rows: Sequence[System], records: Records | None = None) -> list[Verdict]:
    """Compare systems (`opponents`) by each task's first metric, and by the average.

    ``records`` are those of the prediction files, by system and task as the files spell it.
    """
    wanted = first_columns(rows)
    return [
        compare(row, against, column, records)
        for row, against in opponents(rows)
        for column in wanted
        if column in row.values and column in against.values
    ]


def compare(
    row: System, against: System, column: Column, records: Records | None = None
) -> Verdict:
    """Say whether ``row`` differs from ``against`` in ``column`` beyond noise.

    Where the records of both are there and give the scores, on the same examples
    (`statistics.compare`). Otherwise a difference counts when it exceeds
    ``2 * sqrt(se1^2 + se2^2)``, about a 95 % interval for two independent samples; of systems that
    answered the same questions it errs on the side of "within noise".
    """
    paired = _paired(row, against, column, records or {})
    ours, theirs = row.values[column], against.values[column]
    difference = ours.score - theirs.score
    noise = None
    if ours.stderr is not None and theirs.stderr is not None:
        noise = 2 * math.hypot(ours.stderr, theirs.stderr)
    if paired is not None:
        word = paired.verdict
    elif noise is None or not math.isfinite(difference):
        word, noise = "unknown", None
    elif abs(difference) <= noise:
        word = "within noise"
    else:
        word = "better" if (difference > 0) == column.higher_is_better else "worse"
    n = min(ours.n, theirs.n) if paired is None else paired.n
    return Verdict(row.name, against.name, column, difference, noise, n, word, paired)


def _paired(
    row: System, against: System, column: Column, records: Records
) -> statistics.Comparison | None:
    """Compare on the same examples; None where that cannot be done."""
    metric = column.known
    sides = [records.get((system.name, prediction_name(column.task))) for system in (row, against)]
    if metric is None or metric.name != column.metric or not all(sides):
        return None
    try:
        for system, side in zip((row, against), sides, strict=True):
            score = system.values[column].score
            # Records of another evaluation than the table's would compare something else.
            if not math.isclose(metric.value(*metric.arrays(side)), score, rel_tol=1e-6):  # type: ignore[arg-type]
                return None
        found = statistics.compare(metric, *map(list, sides))  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError, BadData):
        return None
    return found if math.isfinite(found.low) else None
