"""Model + task -> Score."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from elastune.errors import BadData
from elastune.generate import Progress, generate
from elastune.likelihood import MeanLoss, example_losses, mean_loss, text_loss
from elastune.tasks.base import Example, Kind, Score, Task

__all__ = ["MeanLoss", "evaluate", "example_losses", "mean_loss"]

DEFAULT_WINDOW = 512


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
    predictions: Path | None = None,
) -> Score:
    """Measure ``model`` on ``examples`` of ``task``.

    Args:
        batch_tokens: bound on the tokens of a batch; lower it when memory runs out.
        progress: called with (done, total): examples, or tokens for perplexity.
        predictions: write one JSON line per example there (index, prompt, text, extracted, gold,
            correct); generation tasks only.

    Returns:
        Accuracy as a fraction with its binomial standard error sqrt(p (1 - p) / n), which is 0
        when all answers are right or all wrong; or perplexity with a standard error by the delta
        method from the spread between windows (``nan`` for a single window).

    Raises:
        BadData: no examples, or not enough text.
    """
    if not examples:
        raise BadData(f"there are no examples of task {task.name!r} to evaluate on.")
    start = time.perf_counter()
    value, stderr, n = MEASURES[task.kind](
        model, tokenizer, task, examples, batch_tokens, progress, predictions
    )
    return Score(
        task=task.name,
        metric=task.metric,
        value=value,
        stderr=stderr,
        n=n,
        higher_is_better=task.higher_is_better,
        seconds=time.perf_counter() - start,
    )


def _by_generation(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    batch_tokens: int,
    progress: Progress | None,
    predictions: Path | None,
) -> tuple[float, float, int]:
    texts = generate(
        model,
        tokenizer,
        [example.prompt for example in examples],
        max_new_tokens=task.max_new_tokens,
        is_finished=task.is_finished,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    scores = np.array([task.score(t, e) for t, e in zip(texts, examples, strict=True)])
    if predictions is not None:
        _write_predictions(predictions, task, examples, texts)
    # The population deviation of 0/1 scores is sqrt(p (1 - p)).
    return float(scores.mean()), float(scores.std() / math.sqrt(len(scores))), len(scores)


def _by_perplexity(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    batch_tokens: int,
    progress: Progress | None,
    predictions: Path | None,
) -> tuple[float, float, int]:
    window = getattr(task, "window", DEFAULT_WINDOW)
    text = "".join(example.completion for example in examples)
    loss = text_loss(
        model, tokenizer, text, window=window, batch_tokens=batch_tokens, progress=progress
    )
    value = math.exp(loss.loss) if loss.loss < 700 else math.inf
    return value, value * loss.stderr, loss.n


Measure = Callable[..., tuple[float, float, int]]
MEASURES: dict[Kind, Measure] = {"generation": _by_generation, "perplexity": _by_perplexity}


def _write_predictions(
    path: Path, task: Task, examples: Sequence[Example], texts: Sequence[str]
) -> None:
    """Write the answers one JSON object a line; the file is complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for index, (example, text) in enumerate(zip(examples, texts, strict=True)):
                row = {
                    "index": index,
                    "prompt": example.prompt,
                    "text": text,
                    "extracted": task.extract(text),
                    "gold": example.answer,
                    "correct": task.is_correct(text, example),
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
