"""To be written."""

from __future__ import annotations

from typing import Any

from elastune.predict.base import Plan


def predict_windows(
    model: Any, tokenizer: Any, task: Any, examples: Any, *, batch_tokens: int, done: Any
) -> Plan:
    """Not written yet."""
    raise NotImplementedError
