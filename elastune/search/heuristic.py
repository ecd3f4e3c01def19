"""No search: the sub-networks that are known beforehand (Shears, LoNAS)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elastune.search.base import Known, Trial, first_untried
from elastune.search.history import History
from elastune.space import SearchSpace, SubnetConfig


def propose(
    space: SearchSpace, trials: Sequence[Trial], rng: np.random.Generator, known: Known
) -> SubnetConfig | None:
    """Return the heuristic, the largest and the smallest configuration, in turn; then None."""
    return first_untried(space, History.of(trials).tried)
