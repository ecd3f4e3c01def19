"""Random search, after the configurations that need no search at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elastune.search.base import Trial
from elastune.space import SearchSpace, SubnetConfig

_ATTEMPTS = 100


def propose(space: SearchSpace, trials: Sequence[Trial], rng: np.random.Generator) -> SubnetConfig:
    """Return heuristic, largest and smallest first, then uniform draws that were not tried yet."""
    tried = {trial.config for trial in trials}
    for config in (space.heuristic(), space.largest(), space.smallest()):
        if config not in tried:
            return config
    draw = space.sample(rng)
    for _ in range(_ATTEMPTS):
        if draw not in tried:
            break
        draw = space.sample(rng)
    return draw
