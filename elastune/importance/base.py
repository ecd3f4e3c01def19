"""The contract of importance: how much each weight of a model matters.

Shapes: `O` out features, `I` in features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

Scores = dict[str, Tensor]
"""Name of a weight (``model.layers.0.mlp.up_proj.weight``) -> float32 ``(O, I)``; large = keep."""


class SharedScores(Scores):
    """Scores that several weights share: shaped like the weights, kept small where they are saved.

    Attributes:
        blocks: name -> rows and columns of the rectangles of weights that share a score, counted
            from the first row and column; at the edges they may be cut.
    """

    def __init__(self, scores: Mapping[str, Tensor], blocks: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(scores)
        self.blocks = dict(blocks)


class Importance(Protocol):
    """Scores every weight of the linear layers in a model's blocks.

    `taylor_scores` is one as it is, `movement_scores` with its settings bound
    (``functools.partial``). Magnitude, Wanda and SparseGPT look at one layer at a time:
    `elastune.sparsify` calls them as it goes through the blocks.
    """

    def __call__(self, model: PreTrainedModel, batches: Any, /) -> Scores:
        """Return scores by the weights' names; what ``batches`` holds is the criterion's own."""


class InputStatistic(Protocol):
    """What a criterion gathers about the inputs of one or more projections."""

    def add(self, x: Tensor) -> None:
        """Take in the inputs of one batch, ``(tokens, I)``."""


def zeros_per_row(n_columns: int, ratio: float) -> int:
    """Return how many of a row's weights a ratio zeroes: ``floor(n_columns * ratio)``."""
    # 100 * 0.29 is a hair below 29 in floating point.
    return int(n_columns * ratio + 1e-6)
