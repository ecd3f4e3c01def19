"""How heads and channels compare, for their order and for a threshold, and the file that says so.

The two differ where scores are of single weights: units are sorted by the sum over their weights,
and outlive a threshold as long as any of their weights does (EFTNAS, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from elastune.errors import BadArtifact
from elastune.importance.base import Scores
from elastune.importance.saved import load_scores, save_scores
from elastune.importance.structure import Tie, UnitScores, units_from_weights

_PARTS = ("order", "keep")


@dataclass(frozen=True)
class Ranking:
    """Scores of the units of every half of every block; large = keep.

    Attributes:
        order: what units are sorted by within their half.
        keep: what a threshold, the same for all, is compared with.
    """

    order: UnitScores
    keep: UnitScores

    @classmethod
    def of_units(cls, scores: UnitScores) -> Ranking:
        """Rank by scores of whole units."""
        return cls(scores, scores)

    @classmethod
    def of_weights(cls, model: PreTrainedModel, scores: Scores, tie: Tie = "any") -> Ranking:
        """Rank by scores of single weights, such as those of movement pruning.

        Args:
            model: that the weights belong to.
            scores: of its weights.
            tie: how the weights of a unit make it outlive a threshold.
        """
        return cls(
            units_from_weights(model, scores, tie="sum"),
            units_from_weights(model, scores, tie=tie),
        )

    def save(self, path: Path, made_from: Mapping[str, Any]) -> None:
        """Write both kinds of scores, and what they were made from."""
        tensors = {f"order/{name}": score for name, score in self.order.items()}
        tensors |= {f"keep/{name}": score.clone() for name, score in self.keep.items()}
        save_scores(path, tensors, made_from)

    @classmethod
    def load(cls, path: Path) -> Ranking:
        """Read what `save` wrote.

        Raises:
            BadArtifact: it is missing, damaged, or of something else.
        """
        tensors, _ = load_scores(path)
        found: dict[str, UnitScores] = {part: {} for part in _PARTS}
        for name, score in tensors.items():
            part, _, rest = name.partition("/")
            if part not in found:
                raise BadArtifact(
                    f"{path} holds {name!r}, no scores of heads or channels",
                    try_="the importance.safetensors of a run of this model",
                )
            found[part][rest] = score
        return cls(found["order"], found["keep"])
