"""Class or number by the model's sequence-classification head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from elastune.generate import evaluating
from elastune.heads.sequence_classification import encode_texts, padded
from elastune.metrics import Record
from elastune.predict.base import Plan
from elastune.tasks.base import ClassificationExample, Task

MAX_LENGTH = 512
"""Longer texts are cut, to this or to what the model can read."""


def predict_labels(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    examples: Sequence[ClassificationExample],
    *,
    batch_tokens: int,
    done: Set[int],
) -> Plan:
    """Record ``prediction``, ``gold``, ``correct`` (classes) and the logits of each example."""
    todo = [i for i in range(len(examples)) if i not in done]
    return Plan(len(examples), _records(model, tokenizer, task, examples, todo, batch_tokens))


def _records(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    examples: Sequence[ClassificationExample],
    todo: Sequence[int],
    batch_tokens: int,
) -> Iterator[Record]:
    if not todo:
        return
    limit = min(MAX_LENGTH, getattr(model.config, "max_position_embeddings", MAX_LENGTH))  # type: ignore[arg-type]
    items = encode_texts([examples[i] for i in todo], tokenizer, limit)
    # Longest first: a batch that does not fit into memory fails at once.
    order = sorted(range(len(todo)), key=lambda k: -items[k].n_tokens)
    start = 0
    device = next(model.parameters()).device
    while start < len(order):
        size = max(1, batch_tokens // items[order[start]].n_tokens)
        batch, start = order[start : start + size], start + size
        inputs = {k: v.to(device) for k, v in padded([items[k] for k in batch]).items()}
        for k, logits in zip(batch, _logits(model, inputs), strict=True):
            yield _record(todo[k], task, examples[todo[k]], logits)


@torch.inference_mode()
def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with evaluating(model):
        return model(**inputs).logits.float().cpu()


def _record(index: int, task: Task, example: ClassificationExample, logits: Tensor) -> Record:
    record: Record = {"index": index, "text": example.text}
    if example.text_pair is not None:
        record["text_pair"] = example.text_pair
    if task.kind == "regression":
        return record | {"prediction": float(logits[0]), "gold": example.label}
    prediction, gold = int(logits.argmax()), int(example.label)
    return record | {
        "prediction": prediction,
        "gold": gold,
        "correct": prediction == gold,
        "logits": [round(float(value), 4) for value in logits],
    }
