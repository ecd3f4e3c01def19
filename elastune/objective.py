"""Configuration -> numbers to be minimised: the quality on validation examples, and the size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from elastune.cost import CostModel
from elastune.evaluate import evaluate, mean_loss
from elastune.search.base import Objective
from elastune.space import SubnetConfig
from elastune.supernet import SuperNetwork
from elastune.tasks import Example, Task


def make_objective(
    net: SuperNetwork,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    cost: CostModel,
    *,
    kind: Literal["loss", "score"],
    batch_tokens: int = 8192,
) -> tuple[Objective, tuple[str, ...]]:
    """Return an objective with a cache, and the names of its values, quality first.

    Args:
        net: activated for each measurement, and put back.
        tokenizer: of the model.
        task: that the examples belong to.
        examples: the validation split; never the one that is reported.
        cost: counts what a configuration costs.
        kind: ``"loss"``, the mean loss of the right answers in nats per token (one forward pass),
            or ``"score"``, the task's metric (turned into an error to minimise).
        batch_tokens: tokens in a batch.
    """
    quality = "loss" if kind == "loss" else "error"
    cache: dict[SubnetConfig, Mapping[str, float]] = {}

    def objective(config: SubnetConfig) -> Mapping[str, float]:
        if config not in cache:
            with net.active(config):
                if kind == "loss":
                    value = mean_loss(net.model, tokenizer, examples, batch_tokens=batch_tokens)[0]
                else:
                    score = evaluate(
                        net.model, tokenizer, task, examples, batch_tokens=batch_tokens
                    )
                    value = 1 - score.value if score.higher_is_better else score.value
            cache[config] = {quality: float(value), "params": float(cost(config).params)}
        return cache[config]

    return objective, (quality, "params")
