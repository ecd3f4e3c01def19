"""What a way of scoring examples gives: records, as they come."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from elastune.metrics import Record


@dataclass(frozen=True)
class Plan:
    """Work laid out but not begun.

    Attributes:
        total: records there will be in all, those that are done already included.
        records: makes the missing ones, in any order; each holds its ``index`` below ``total``.
    """

    total: int
    records: Iterator[Record]


class Predictor(Protocol):
    """Scores the examples of one kind of task."""

    def __call__(
        self,
        model: nn.Module,
        tokenizer: Any,
        task: Any,
        examples: Any,
        *,
        batch_tokens: int,
        done: Set[int],
    ) -> Plan:
        """Lay out the scoring of ``examples``, without the records whose index is in ``done``.

        Examples of similar length share a batch of at most ``batch_tokens`` tokens; an example's
        record does not depend on the batch it was in.
        """
