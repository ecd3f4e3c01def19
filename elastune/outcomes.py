"""What each example says of the active sub-network, as parts whose mean is the quality.

So that two sub-networks can be compared on some of the examples, pair by pair. Examples are read
and laid out once; the same examples asked for again make the same batches, whatever is active.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from elastune.data import encode
from elastune.errors import BadData
from elastune.generate import evaluating
from elastune.heads import HEADS
from elastune.likelihood import TokenScorer, batches_by_length, completion_losses, scored_tokens
from elastune.metrics import Metric, mean
from elastune.predict import PREDICTORS
from elastune.predict.classification import MAX_LENGTH
from elastune.tasks import Task
from elastune.tasks.base import AnyExample

MAX_TOKENS = 1024
"""Longer examples of language models are cut, as in `elastune.likelihood.mean_loss`."""


class Outcomes(Protocol):
    """Measures examples under the model as it is."""

    def __call__(self, indices: Sequence[int]) -> np.ndarray:
        """Return the outcomes of some examples, float64, shaped like ``indices``; less is better.

        The mean over all examples is the quality.
        """


class TokenLosses:
    """Of a causal language model: an example's share of the mean loss per token, in nats.

    Raises:
        BadData: no completion fits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        examples: Sequence[Any],
        batch_tokens: int,
    ) -> None:
        self._model = model
        self._rows = [encode(example, tokenizer, MAX_TOKENS) for example in examples]
        self._batch_tokens = batch_tokens
        self._score: TokenScorer | None = None
        n_tokens = sum(map(scored_tokens, self._rows))
        if n_tokens == 0:
            raise BadData(
                "no completion token could be scored.",
                try_="check that the examples have completions, and short prompts",
            )
        self._scale = len(self._rows) / n_tokens

    def __call__(self, indices: Sequence[int]) -> np.ndarray:
        if self._score is None:
            self._score = TokenScorer(self._model)
        rows = [self._rows[i] for i in indices]
        found = np.zeros(len(rows))
        lengths = [len(row.input_ids) for row in rows]
        for batch in batches_by_length(lengths, self._batch_tokens):
            found[batch], _ = completion_losses(self._score, [rows[k] for k in batch])
        return found * self._scale


class HeadLosses:
    """Of any other head: an example's share of the mean loss per target.

    Raises:
        BadData: there are no examples.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        task: Task,
        examples: Sequence[AnyExample],
        batch_tokens: int,
    ) -> None:
        self._model = model
        self._head = HEADS[task.head]
        self._batch_tokens = batch_tokens
        items = self._head.encode(examples, tokenizer, getattr(task, "max_length", MAX_LENGTH))
        self._items: list[list[Any]] = [[] for _ in examples]
        for k, item in enumerate(items):
            # A long context gives several windows, which say whose they are.
            self._items[getattr(item, "example", k)].append(item)
        self._scale = len(examples) / len(items)

    def __call__(self, indices: Sequence[int]) -> np.ndarray:
        owned = [(k, item) for k, i in enumerate(indices) for item in self._items[i]]
        found = np.zeros(len(indices))
        lengths = [self._head.length(item) for _, item in owned]
        for batch in batches_by_length(lengths, self._batch_tokens):
            losses = self._losses([owned[j][1] for j in batch])
            np.add.at(found, [owned[j][0] for j in batch], losses)
        return found * self._scale

    @torch.inference_mode()
    def _losses(self, items: Sequence[Any]) -> list[float]:
        """Return the loss of each item of a batch."""
        made = self._head.collate(items)
        batch: dict[str, Tensor] = {key: v.to(self._model.device) for key, v in made.items()}
        with evaluating(self._model):
            outputs = self._head.outputs(self._model, batch)
        rows = range(len(items))
        return [
            float(
                self._head.loss_of(
                    tuple(part[i : i + 1] for part in outputs),
                    {key: value[i : i + 1] for key, value in batch.items()},
                )
            )
            for i in rows
        ]


class Answers:
    """Of a score that is a mean over examples, such as accuracy: an example's error.

    Args:
        metric: one that `is_mean`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        task: Task,
        examples: Sequence[AnyExample],
        metric: Metric,
        batch_tokens: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._task = task
        self._examples = examples
        self._metric = metric
        self._batch_tokens = batch_tokens

    def __call__(self, indices: Sequence[int]) -> np.ndarray:
        plan = PREDICTORS[self._task.kind](
            self._model,
            self._tokenizer,
            self._task,
            [self._examples[i] for i in indices],
            batch_tokens=self._batch_tokens,
            done=frozenset(),
        )
        records = sorted(plan.records, key=lambda record: record["index"])
        (values,) = self._metric.arrays(records)
        return 1 - values if self._metric.higher_is_better else values


def is_mean(metric: Metric) -> bool:
    """Tell whether a metric is the plain mean of one number per example."""
    return metric.value is mean and len(metric.columns) == 1 and metric.count is None
