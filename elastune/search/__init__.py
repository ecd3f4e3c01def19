"""Search over sub-networks: one algorithm, one file, behind one ``propose``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from elastune.errors import BadArtifact, BadRecipe, nearest
from elastune.search import hill_climb, random_search
from elastune.search.base import Known, Measurement, Objective, Propose, SearchResult, Trial
from elastune.space import SearchSpace, SubnetConfig

ALGORITHMS: Mapping[str, Propose] = {
    "random": random_search.propose,
    "hill_climb": hill_climb.propose,
}

__all__ = [
    "ALGORITHMS",
    "Known",
    "Measurement",
    "Objective",
    "Propose",
    "SearchResult",
    "Trial",
    "search",
]

_LOG = logging.getLogger(__name__)


def search(
    space: SearchSpace,
    objective: Objective,
    *,
    values: tuple[str, ...],
    algorithm: str = "random",
    trials: int,
    storage: Path,
    seed: int = 0,
    start: Sequence[SubnetConfig] = (),
    known: Known | None = None,
    progress: Callable[[int, int, Trial], None] | None = None,
) -> SearchResult:
    """Try configurations until there are ``trials`` of them, those already stored included.

    The sequence of trials depends on (space, algorithm, seed, start) and the values measured alone,
    so a killed search that goes on makes the same trials as an uninterrupted one. A trial that
    measures as NaN or infinite is kept as failed, with a warning, and the search goes on.

    Args:
        space: what to choose from.
        objective: measures a configuration; every value is minimised.
        values: names of the objective's values, quality first.
        algorithm: a key of `ALGORITHMS`.
        trials: how many configurations to have tried at the end; never more than the space holds.
        storage: the journal file.
        seed: of the proposals.
        start: configurations to try before those of the algorithm, in this order; they count as
            trials.
        known: what algorithms may know besides the history.
        progress: called with (trials done, trials in all, last trial).

    Raises:
        BadRecipe: unknown algorithm.
        InvalidSubnet: a start that is not in the space.
        BadArtifact: the journal is corrupt, of another space or of other objectives.
        ElastuneError: all trials failed.
    """
    if algorithm not in ALGORITHMS:
        raise BadRecipe(
            f"unknown search algorithm {algorithm!r}{nearest(algorithm, ALGORITHMS)}; "
            f"known are {', '.join(ALGORITHMS)}"
        )
    known = known or Known(values)
    for config in start:
        space.check(config)
    # Optuna takes a second to import; spaces and results do without it.
    from elastune.search.store import TrialStore

    store = TrialStore(storage, values)
    history = store.trials()
    if any(trial.config not in space for trial in history):
        raise BadArtifact(f"{storage} is of another search space", try_="delete it")
    total = min(trials, space.size)
    for number in range(len(history), total):
        tried = {trial.config for trial in history}
        given = [config for config in start if config not in tried]
        rng = np.random.default_rng((seed, number))
        config = given[0] if given else ALGORITHMS[algorithm](space, history, rng, known)
        measured = objective(config)
        # In the order of the journal.
        trial = Trial(number, config, {name: float(measured[name]) for name in values})
        store.add(config, trial.values)
        history.append(trial)
        if trial.failed:
            found = ", ".join(f"{name} {value}" for name, value in trial.values.items())
            _LOG.warning("trial %d failed: %s for %s", number, found, config.short())
        if progress is not None:
            progress(number + 1, total, trial)
    result = SearchResult(tuple(history))
    if history:
        result.best()  # which says so when all have failed
    return result
