"""Configuration -> numbers to be minimised: the quality on validation examples, and the cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from elastune.cost import CostModel
from elastune.evaluate import evaluate, mean_loss
from elastune.generate import evaluating
from elastune.heads import HEADS
from elastune.predict.classification import MAX_LENGTH
from elastune.search.base import Objective
from elastune.space import SubnetConfig
from elastune.supernet import SuperNetwork
from elastune.tasks import Task
from elastune.tasks.base import AnyExample


def make_objective(
    net: SuperNetwork,
    tokenizer: Any,
    task: Task,
    examples: Sequence[AnyExample],
    cost: CostModel,
    *,
    kind: Literal["loss", "score"],
    against: Literal["params", "nonzero", "macs", "block_macs"] = "params",
    batch_tokens: int = 8192,
) -> tuple[Objective, tuple[str, ...]]:
    """Return an objective with a cache, and the names of its two values, quality first.

    What the objective measures holds every other count of the `Cost`, too, by its name.

    Args:
        net: activated for each measurement, and put back.
        tokenizer: of the model.
        task: that the examples belong to.
        examples: the validation split; never the one that is reported.
        cost: counts what a configuration costs.
        kind: ``"loss"``, the mean loss of the right answers (one forward pass; in nats per token
            for language models), or ``"score"``, the task's first metric (turned into an error to
            minimise).
        against: the cost that is minimised beside the quality.
        batch_tokens: tokens in a batch.
    """
    quality = "loss" if kind == "loss" else "error"
    cache: dict[SubnetConfig, Mapping[str, float]] = {}

    def objective(config: SubnetConfig) -> Mapping[str, float]:
        if config not in cache:
            with net.active(config):
                if kind == "loss":
                    value = _mean_loss(net.model, tokenizer, task, examples, batch_tokens)
                else:
                    score = evaluate(
                        net.model, tokenizer, task, examples, batch_tokens=batch_tokens
                    )
                    value = 1 - score.value if score.higher_is_better else score.value
            counts = {name: float(count) for name, count in vars(cost(config)).items()}
            cache[config] = {quality: float(value), **counts}
        return cache[config]

    return objective, (quality, against)


def _mean_loss(
    model: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    examples: Sequence[AnyExample],
    batch_tokens: int,
) -> float:
    """Return the mean loss over the targets of the task's head."""
    if task.head == "causal-lm":
        return mean_loss(model, tokenizer, examples, batch_tokens=batch_tokens).loss  # type: ignore[arg-type]
    head = HEADS[task.head]
    items = head.encode(examples, tokenizer, getattr(task, "max_length", MAX_LENGTH))
    items = sorted(items, key=head.length, reverse=True)
    total, count, start = 0.0, 0, 0
    with evaluating(model), torch.inference_mode():
        while start < len(items):
            size = max(1, batch_tokens // head.length(items[start]))
            batch = head.collate(items[start : start + size])
            start += size
            batch = {key: value.to(model.device) for key, value in batch.items()}
            total += float(head.loss(model, batch))
            count += int(head.n_targets(batch))
    return total / count
