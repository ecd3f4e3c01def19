"""Search over sub-networks: one algorithm, one file, behind one ``propose``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from elastune.errors import BadArtifact, BadRecipe, ElastuneError, nearest
from elastune.search import random_search
from elastune.search.base import Objective, Propose, SearchResult, Trial
from elastune.space import SearchSpace, SubnetConfig

ALGORITHMS: Mapping[str, Propose] = {"random": random_search.propose}

__all__ = ["ALGORITHMS", "Objective", "Propose", "SearchResult", "Trial", "search"]


def search(
    space: SearchSpace,
    objective: Objective,
    *,
    values: tuple[str, ...],
    algorithm: str = "random",
    trials: int,
    storage: Path,
    seed: int = 0,
    progress: Callable[[int, int, Trial], None] | None = None,
) -> SearchResult:
    """Try configurations until there are ``trials`` of them, those already stored included.

    The sequence of trials depends on (space, algorithm, seed) and the values measured alone, so a
    killed search that goes on makes the same trials as an uninterrupted one.

    Args:
        space: what to choose from.
        objective: measures a configuration; every value is minimised.
        values: names of the objective's values, quality first.
        algorithm: a key of `ALGORITHMS`.
        trials: how many configurations to have tried at the end; never more than the space holds.
        storage: the journal file.
        seed: of the proposals.
        progress: called with (trials done, trials in all, last trial).

    Raises:
        BadRecipe: unknown algorithm.
        BadArtifact: the journal is corrupt, of another space or of other objectives.
        ElastuneError: a configuration measures as NaN or infinite; its trial is not recorded.
    """
    if algorithm not in ALGORITHMS:
        raise BadRecipe(
            f"unknown search algorithm {algorithm!r}{nearest(algorithm, ALGORITHMS)}; "
            f"known are {', '.join(ALGORITHMS)}"
        )
    # Optuna takes a second to import; spaces and results do without it.
    from elastune.search.store import TrialStore

    store = TrialStore(storage, values)
    history = store.trials()
    if any(trial.config not in space for trial in history):
        raise BadArtifact(f"{storage} is of another search space", try_="delete it")
    total = min(trials, space.size)
    for number in range(len(history), total):
        rng = np.random.default_rng((seed, number))
        config = ALGORITHMS[algorithm](space, history, rng)
        measured = _checked(objective(config), values, config)
        store.add(config, measured)
        history.append(Trial(number, config, measured))
        if progress is not None:
            progress(number + 1, total, history[-1])
    return SearchResult(tuple(history))


def _checked(
    measured: Mapping[str, float], values: tuple[str, ...], config: SubnetConfig
) -> dict[str, float]:
    """Return the measured values in the order of ``values``, which is that of the journal."""
    ordered = {name: float(measured[name]) for name in values}
    for name, value in ordered.items():
        if not math.isfinite(value):
            raise ElastuneError(
                f"{name} is {value} for the sub-network {config.short()}",
                try_="dtype=float32, or training again with a lower learning rate",
            )
    return ordered
