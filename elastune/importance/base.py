"""The contract of importance: how much each weight of a model matters.

Shapes: `O` out features, `I` in features.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

Scores = dict[str, Tensor]
"""Name of a weight (``model.layers.0.mlp.up_proj.weight``) -> float32 ``(O, I)``; large = keep."""


class InputStatistic(Protocol):
    """What a criterion gathers about the inputs of one or more projections."""

    def add(self, x: Tensor) -> None:
        """Take in the inputs of one batch, ``(tokens, I)``."""


def zeros_per_row(n_columns: int, ratio: float) -> int:
    """Return how many of a row's weights a ratio zeroes: ``floor(n_columns * ratio)``."""
    # 100 * 0.29 is a hair below 29 in floating point.
    return int(n_columns * ratio + 1e-6)
