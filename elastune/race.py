"""Racing: candidates see the examples in rungs, and leave when a better rival is sure.

A candidate and its rival answer the same examples, so that the difference of each pair is what
counts (as in F-Race, Birattari et al. 2002, and Hoeffding races, Maron and Moore 1994). The
examples come in a fixed random order; after each rung but the last a one-sided test asks whether
the mean difference is above zero.

The test is Student's for paired differences with one more, made-up pair: one that speaks for the
candidate, by twice the largest difference seen. Without it a few examples that happen to miss a
long tail look surer than they are: at a nominal 5 % the plain test drops 20 % of candidates that
are as good as their rival, if differences are lognormal with the tail on the candidate's side. With
it 5 % holds there, and for normal, heavy-tailed and 0/1 differences (tests/test_race.py), and what
is lost is little: a candidate that is worse by one standard deviation of the differences is dropped
after 32 pairs in five of six cases, by two after 16 in more than half. The error rate is that of a
whole race: each of its tests gets an equal part (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from elastune.errors import BadRecipe

RUNGS = (1 / 8, 1 / 4, 1 / 2, 1.0)
"""Parts of the examples after which candidates are compared; the last has all."""
FEWEST = 16
"""Pairs below which no test is made."""
ERROR_RATE = 0.05
"""Of candidates as good as their rival, the part that a race may drop."""
_MADE_UP = 2.0


def rung_ends(n: int, rungs: Sequence[float] = RUNGS) -> tuple[int, ...]:
    """Return how many of ``n`` examples have been seen after each rung; the last is ``n``.

    Rungs of fewer than `FEWEST` examples are left out.

    Raises:
        BadRecipe: a part outside of 0 to 1, or parts that do not ascend to 1.
    """
    parts = list(rungs)
    if not parts or sorted(set(parts)) != parts or parts[0] <= 0 or parts[-1] != 1:
        raise BadRecipe(f"rungs must ascend to 1, such as {RUNGS}; got {tuple(rungs)}")
    ends = {int(np.ceil(n * part)) for part in parts[:-1]}
    return (*sorted(end for end in ends if FEWEST <= end < n), n)


def is_worse(differences: np.ndarray, error_rate: float) -> bool:
    """Tell whether paired differences are sure to have a mean above zero.

    Args:
        differences: ``(pairs,)``, candidate less rival of what is minimised, of examples drawn at
            random. NaN among them is no proof of anything.
        error_rate: of this one test, where the mean is zero or below.
    """
    n = len(differences)
    if n < FEWEST or not np.isfinite(differences).all():
        return False
    pairs = np.append(differences, -_MADE_UP * np.abs(differences).max())
    spread = float(pairs.std(ddof=1))
    if spread == 0:  # every pair is equal
        return False
    statistic = float(pairs.mean()) / (spread / (n + 1) ** 0.5)
    return statistic > _quantile(error_rate, n)


@lru_cache(maxsize=1024)
def _quantile(error_rate: float, freedom: int) -> float:
    """Return what Student's t exceeds at this rate."""
    from scipy.stats import t

    return float(t.isf(error_rate, freedom))
