"""Negative log-likelihood of running text, window by window."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from torch import nn

from elastune.likelihood import window_losses
from elastune.predict.base import Plan
from elastune.tasks.base import Example


def predict_windows(
    model: nn.Module,
    tokenizer: Any,
    task: Any,
    examples: Sequence[Example],
    *,
    batch_tokens: int,
    done: Set[int],
) -> Plan:
    """Record ``nll`` (summed, in nats) and ``tokens`` (predicted) of each window of the text.

    The text is that of all examples, joined; windows of ``task.window`` tokens do not overlap.

    Raises:
        BadData: the text has less than two tokens.
    """
    total, losses = window_losses(
        model,
        tokenizer,
        "".join(example.completion for example in examples),
        window=task.window,
        batch_tokens=batch_tokens,
        done=done,
    )
    records = ({"index": i, "nll": nll, "tokens": tokens} for i, nll, tokens in losses)
    return Plan(total, records)
