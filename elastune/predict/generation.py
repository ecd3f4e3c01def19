"""Answers by greedy generation, judged by the task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Any

from torch import nn

from elastune.generate import generate_each
from elastune.metrics import Record
from elastune.predict.base import Plan
from elastune.tasks.base import Example, Task


def predict_texts(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_tokens: int,
    done: Set[int],
) -> Plan:
    """Record prompt, generated text, the answer found in it, gold and ``correct``.

    Records come as texts are finished, so that a killed evaluation keeps them.
    """
    todo = [i for i in range(len(examples)) if i not in done]

    def records() -> Iterator[Record]:
        texts = generate_each(
            model,
            tokenizer,
            [examples[i].prompt for i in todo],
            max_new_tokens=task.max_new_tokens,
            is_finished=task.is_finished,
            batch_tokens=batch_tokens,
        )
        for k, text in texts:
            example = examples[todo[k]]
            yield {
                "index": todo[k],
                "prompt": example.prompt,
                "text": text,
                "extracted": task.extract(text),
                "gold": example.answer,
                "correct": task.is_correct(text, example),
            }

    return Plan(len(examples), records())
