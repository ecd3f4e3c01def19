"""The most likely of given choices, in all and by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Any

import numpy as np
from torch import nn

from elastune.choices import context_length, encode_pairs, loglikelihoods, question_of
from elastune.metrics import Record
from elastune.predict.base import Plan
from elastune.tasks.base import MultipleChoiceExample


def predict_choices(
    model: nn.Module,
    tokenizer: Any,
    task: Any,
    examples: Sequence[MultipleChoiceExample],
    *,
    batch_tokens: int,
    done: Set[int],
) -> Plan:
    """Record the choices' log-likelihoods in nats and the choices they make likeliest.

    ``prediction`` has the highest log-likelihood; ``prediction_norm`` the highest per character of
    the choice without the blank before it (as lm-evaluation-harness counts for ``acc_norm``). Of
    equal ones the first wins.

    Raises:
        BadData: a choice without text, or longer than the model's context.
    """
    todo = [i for i in range(len(examples)) if i not in done]

    def records() -> Iterator[Record]:
        texts = [scored_texts(examples[i]) for i in todo]
        pairs = iter(encode_pairs(tokenizer, [pair for question in texts for pair in question]))
        limit = context_length(model, tokenizer)
        questions = [question_of([next(pairs) for _ in question], limit) for question in texts]
        found = loglikelihoods(model, questions, batch_tokens=batch_tokens)
        for k, values in found:
            yield _record(todo[k], examples[todo[k]], values)

    return Plan(len(examples), records())


def scored_texts(example: MultipleChoiceExample) -> list[tuple[str, str]]:
    """Return for each choice the text before what is scored, and what is scored."""
    starts = getattr(example, "scored_from", None) or (0,) * len(example.choices)
    return [
        (example.prompt + choice[:start], choice[start:])
        for choice, start in zip(example.choices, starts, strict=True)
    ]


def _record(index: int, example: MultipleChoiceExample, values: list[float]) -> Record:
    scored = [rest for _, rest in scored_texts(example)]
    lengths = [max(1, len(text.removeprefix(" "))) for text in scored]
    prediction = int(np.argmax(values))
    prediction_norm = int(np.argmax(np.array(values) / lengths))
    return {
        "index": index,
        "prompt": example.prompt,
        "choices": list(example.choices),
        "gold": example.gold,
        "loglikelihoods": [round(value, 6) for value in values],
        "prediction": prediction,
        "prediction_norm": prediction_norm,
        "correct": prediction == example.gold,
        "correct_norm": prediction_norm == example.gold,
    }
