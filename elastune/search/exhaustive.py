"""Every configuration, from the largest to the smallest: for spaces small enough to try whole."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from elastune.search.base import Known, Trial
from elastune.space import SearchSpace, SubnetConfig


def propose(
    space: SearchSpace, trials: Sequence[Trial], rng: np.random.Generator, known: Known
) -> SubnetConfig | None:
    """Return the first untried configuration in counting order, or None where all were tried.

    The last dim changes fastest; the largest configuration is first and the smallest is last.
    """
    names = [dim.name for dim in space.dims]
    # Plain tuples: building a configuration for each that was tried already takes far longer.
    tried = {tuple(trial.config[name] for name in names) for trial in trials}
    every = itertools.product(*(dim.choices for dim in space.dims))
    found = next((choices for choices in every if choices not in tried), None)
    return None if found is None else SubnetConfig(dict(zip(names, found, strict=True)))
