"""What to cut of a model first, and what then: Fisher scores in rounds, per cost that is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from elastune.block_costs import counted_costs, measured_costs
from elastune.heads import Head
from elastune.importance.fisher import fisher_scores, scores_in_rounds
from elastune.importance.passes import Batches
from elastune.importance.structure import UnitScores
from elastune.models.blocks import PARTS, blocks


def rank_in_rounds(
    model: PreTrainedModel,
    batches: Batches,
    *,
    head: Head | None = None,
    low: float = 0.2,
    rounds: int = 16,
    cost: Literal["macs", "params", "latency"] = "macs",
    tokens: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> UnitScores:
    """Rank heads and channels by the order in which they can go, to the loss's least harm.

    Good for `space_from_importance` without ``per_cost``, and for `reorder_`. The model is not
    changed.

    Args:
        model: of a known architecture, plain; best already trained on the task.
        batches: as `fisher_scores` takes them; read ``rounds`` times, so not an iterator.
        head: makes the loss of the batches.
        low: what remains before the last round, as a part of the blocks' cost.
        rounds: how many times what is left is scored anew.
        cost: what is saved, of the blocks: MACs, parameters, or latency (measured).
        tokens: length that MACs and latency are for.
        progress: called with (rounds done, rounds).

    Returns:
        ``layers.<i>.heads|ffn`` -> float32 ``(U,)`` between 0 and 1, large = keep: the part of the
        cost that has gone when the unit has.

    Raises:
        BadRecipe: bounds that cannot be.
        BadData: batches are missing or have no loss.
        UnsupportedModel: unknown family.
    """
    is_measured = cost == "latency"
    costs = measured_costs(model, tokens) if is_measured else counted_costs(model, cost, tokens)
    n_units = {
        f"layers.{block.index}.{part}": block.n_units(part)
        for block in blocks(model)
        for part in PARTS
        if block.n_units(part)
    }
    none_left = np.array(0)
    unit_costs = {name: float(costs.saved(name, none_left)) / n for name, n in n_units.items()}

    def score(kept: Mapping[str, Tensor]) -> UnitScores:
        return fisher_scores(model, batches, head=head, kept=kept)

    return scores_in_rounds(score, unit_costs, n_units, low=low, rounds=rounds, progress=progress)
