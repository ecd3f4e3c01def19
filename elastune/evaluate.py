"""Model + task -> Score."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from elastune.errors import BadData
from elastune.likelihood import MeanLoss, example_losses, mean_loss
from elastune.metrics import Metric, Record
from elastune.predict import PREDICTORS
from elastune.predictions import PredictionFile
from elastune.statistics import stderr
from elastune.tasks.base import AnyExample, Measured, Score, Task

__all__ = ["MeanLoss", "evaluate", "example_losses", "mean_loss"]

Progress = Callable[[int, int], None]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    examples: Sequence[AnyExample],
    *,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
    predictions: Path | None = None,
    key: str = "",
) -> Score:
    """Measure ``model`` on ``examples`` of ``task``.

    Args:
        batch_tokens: bound on the tokens of a batch; lower it when memory runs out.
        progress: called with (done, total) records: examples, or windows of text for perplexity.
        predictions: write one JSON line per example there: question, answer, gold, right or wrong.
            An evaluation that was killed goes on from what it had written.
        key: tells evaluations apart: records left under another key are not gone on from.

    Returns:
        The task's metrics with their standard errors: by formula where there is one, otherwise by
        the bootstrap over examples (`elastune.statistics`).

    Raises:
        BadData: no examples, or not enough text.
    """
    if not examples:
        raise BadData(
            f"there are no examples of task {task.name!r} to evaluate on.",
            try_="another split, a larger task.limit, or more data",
        )
    started = time.perf_counter()
    kept = PredictionFile(predictions, key)
    plan = PREDICTORS[task.kind](
        model, tokenizer, task, examples, batch_tokens=batch_tokens, done=kept.records.keys()
    )
    if progress is not None:
        progress(len(kept.records), plan.total)
    with kept.open():
        for record in plan.records:
            now = time.perf_counter()
            kept.add(record, now - started)
            started = now
            if progress is not None:
                progress(len(kept.records), plan.total)
    records = kept.finish()
    first, *others = [_measured(metric, records) for metric in task.metrics]
    return Score(
        task=task.name,
        metric=first.metric,
        value=first.value,
        stderr=first.stderr,
        n=first.n,
        higher_is_better=task.higher_is_better,
        seconds=kept.seconds,
        others=tuple(others),
    )


def _measured(metric: Metric, records: Sequence[Record]) -> Measured:
    """Compute one metric over all records."""
    value = metric.value(*metric.arrays(records))
    n = len(records)
    if metric.count is not None:
        n = int(sum(record[metric.count] for record in records))
    return Measured(metric.name, value, stderr(metric, records), n)
