"""Every sub-network that one threshold over the scores of all units can cut out of a model.

A unit survives if its score is larger than the threshold. As the threshold rises through the scores
themselves, sizes only fall: the sub-networks are nested.

Shapes: `S` thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from elastune.block_costs import BlockCosts, unit_size
from elastune.models.blocks import PARTS, Block, Part
from elastune.space import SubnetConfig
from elastune.structure import full_size


@dataclass(frozen=True)
class CutRules:
    """How survivors become sizes.

    Attributes:
        round_to: widths are multiples of this, the nearest, at least one; all channels stay all.
        discard: a half that keeps less than this part of its units is absent.
        keep_head: a block that stands keeps at least one unit of its heads.
    """

    round_to: int = 1
    discard: float = 0.02
    keep_head: bool = False


@dataclass(frozen=True)
class _Half:
    """One scored half of a block."""

    scores: np.ndarray
    """Ascending."""
    sizes: np.ndarray
    """Size in heads or channels by the number of survivors, 0 to all."""
    least: int
    """The smallest size that is not 0."""

    def sizes_at(self, thresholds: np.ndarray) -> np.ndarray:
        survivors = len(self.scores) - np.searchsorted(self.scores, thresholds, side="right")
        found: np.ndarray = self.sizes[survivors]
        return found


class ThresholdCuts:
    """The sub-networks of all thresholds, the full model first.

    Args:
        blocks: of the model.
        scores: dim name -> finite float64 ``(U,)``, one for each unit that is cut alone. Halves
            without scores stay whole.
        rules: see `CutRules`.
    """

    def __init__(
        self, blocks: Sequence[Block], scores: Mapping[str, np.ndarray], rules: CutRules
    ) -> None:
        self.rules = rules
        self._blocks = blocks
        self._halves = {
            (block.index, part): _half(block, part, scores[name], rules)
            for block in blocks
            for part in PARTS
            if (name := f"layers.{block.index}.{part}") in scores
        }
        values, self._ties = np.unique(np.concatenate(list(scores.values())), return_counts=True)
        # Below all scores: everything survives.
        self.thresholds = np.concatenate([[-np.inf], values])
        n_gone = sum(self._sizes(block, self.thresholds)[1].astype(int) for block in blocks)
        n_useful = int((np.asarray(n_gone) < len(blocks)).sum())
        self.thresholds = self.thresholds[:n_useful]

    def threshold(self, step: int) -> float | None:
        """Return the threshold of a step; None for the full model's."""
        return float(self.thresholds[step]) if step else None

    def n_tied(self, step: int) -> int:
        """Return how many units go at a step, all of the same score."""
        return int(self._ties[step - 1]) if step else 0

    def config(self, step: int) -> SubnetConfig:
        """Return a sub-network over ``layers.<i>.heads``, ``.ffn`` and ``.block`` of all blocks.

        Blocks that are left out have their full widths.
        """
        choices: dict[str, int] = {}
        for block in self._blocks:
            sizes, gone = self._sizes(block, self.thresholds[step : step + 1])
            for part in PARTS:
                full = full_size(block, part)
                if full:
                    kept = full if gone[0] else int(sizes[part][0])
                    choices[f"layers.{block.index}.{part}"] = kept
            choices[f"layers.{block.index}.block"] = int(not gone[0])
        return SubnetConfig(choices)

    def costs(self, costs: BlockCosts) -> np.ndarray:
        """Return the cost of every step as a part of the full model's, ``(S,)``."""
        saved = np.zeros(len(self.thresholds))
        for block in self._blocks:
            sizes, gone = self._sizes(block, self.thresholds)
            cut = np.zeros(len(saved))
            for part in PARTS:
                if (block.index, part) in self._halves:
                    cut += costs.saved(f"layers.{block.index}.{part}", sizes[part])
            saved += np.where(gone, costs.whole.get(block.index, 0.0), cut) if gone.any() else cut
        return (costs.full - saved) / costs.full

    def _sizes(
        self, block: Block, thresholds: np.ndarray
    ) -> tuple[dict[Part, np.ndarray], np.ndarray]:
        """Return the sizes of a block's halves ``(S,)`` each, and where it is left out ``(S,)``."""
        sizes: dict[Part, np.ndarray] = {}
        for part in PARTS:
            half = self._halves.get((block.index, part))
            if half is None:
                sizes[part] = np.full(len(thresholds), full_size(block, part))
            else:
                sizes[part] = half.sizes_at(thresholds)
        gone = (sizes["heads"] == 0) & (sizes["ffn"] == 0)
        heads = self._halves.get((block.index, "heads"))
        if self.rules.keep_head and heads is not None:
            sizes["heads"] = np.where(gone, 0, np.maximum(sizes["heads"], heads.least))
        return sizes, gone


def _half(block: Block, part: Part, scores: np.ndarray, rules: CutRules) -> _Half:
    """Prepare one half: the size for each number of survivors."""
    unit, full = unit_size(block, part), full_size(block, part)
    step = rules.round_to if part == "ffn" else 1
    n = len(scores)
    survivors = np.arange(n + 1)
    rounded = np.maximum(np.floor(survivors / step + 0.5) * step, step)
    sizes = np.minimum(rounded, n).astype(int) * unit
    sizes[-1] = full
    least = min(step, n) * unit
    sizes[(survivors / n < rules.discard) | (survivors == 0)] = 0
    if block.fixed_depth:
        sizes = np.maximum(sizes, least)
    return _Half(np.sort(scores), sizes, least)
