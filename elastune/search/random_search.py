"""Random search, after the configurations that need no search at all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from elastune.search.base import Known, Trial, first_untried
from elastune.search.history import History
from elastune.space import SearchSpace, SubnetConfig


def propose(
    space: SearchSpace, trials: Sequence[Trial], rng: np.random.Generator, known: Known
) -> SubnetConfig | None:
    """Return heuristic, largest and smallest first, then uniform draws that were not tried yet.

    None where all were tried.
    """
    tried = History.of(trials).tried
    first = first_untried(space, tried)
    if first is not None:
        return first
    if 2 * len(tried) >= space.size:  # few are left, and so few in all that they can be listed
        codes = itertools.product(*(range(len(dim.choices)) for dim in space.dims))
        left = [config for config in map(space.decode, codes) if config not in tried]
        return left[int(rng.integers(len(left)))] if left else None
    draw = space.sample(rng)
    while draw in tried:
        draw = space.sample(rng)
    return draw
