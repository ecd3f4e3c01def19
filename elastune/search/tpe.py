"""Tree-structured Parzen estimators: Optuna's sampler, fed from the history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from elastune.search import random_search
from elastune.search.base import Known, Trial, first_untried
from elastune.search.history import History
from elastune.search.nsga2 import least_crowded
from elastune.space import SearchSpace, SubnetConfig

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_STARTUP = 10  # random trials before the first model, as Optuna has them
_CELLS = 20_000  # the most trials x dims that a model is fitted to
_FEWEST = 50  # trials that it is fitted to even so
_DRAWS = 4


def propose(
    space: SearchSpace, trials: Sequence[Trial], rng: np.random.Generator, known: Known
) -> SubnetConfig | None:
    """Return heuristic, largest and smallest first, ten random ones, then what the sampler draws.

    All dims are drawn jointly: one by one, Optuna's default for several values, takes seconds at
    200 dims. The sampler sees the best trials only, as many as cost it about 20,000 numbers (95
    trials of 210 dims), so that a proposal takes no longer as the history grows. Failed trials, and
    those that other workers are measuring, are shown as running ones, which it keeps away from.

    What was tried already is drawn anew, then changed by one step. None where all were tried.
    """
    history = History.of(trials)
    tried = history.tried
    if len(tried) >= space.size:
        return None
    first = first_untried(space, tried)
    if first is not None:
        return first
    if len(history.finished) < _STARTUP:
        return random_search.propose(space, history, rng, known)
    draw = _sampler(space, _shown(space, history), len(known.values), rng)
    for _ in range(_DRAWS):
        config = draw()
        if config not in tried:
            return config
    near = [neighbour for neighbour in space.neighbours(config) if neighbour not in tried]
    if near:
        return near[int(rng.integers(len(near)))]
    return random_search.propose(space, history, rng, known)


def _shown(space: SearchSpace, history: History) -> list[Trial]:
    """Return the best trials that have values and the last that have none, in their order."""
    most = max(_FEWEST, _CELLS // len(space))
    rows = least_crowded(history.values, history.violations, most)
    best = [history.finished[row] for row in rows]
    without = [trial for trial in history if trial.failed][-most // 4 :]
    return sorted([*best, *without], key=lambda trial: trial.number)


def _sampler(
    space: SearchSpace, shown: Sequence[Trial], n_values: int, rng: np.random.Generator
) -> Callable[[], SubnetConfig]:
    """Return a function that draws from a model of the trials, anew each time it is called."""
    # Optuna takes a second to import; other algorithms do without it.
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution
    from optuna.study import StudyDirection

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.InMemoryStorage()
    study_id = storage.create_new_study([StudyDirection.MINIMIZE] * n_values, "tpe")
    # Not by Study.add_trial: its checks take 0.6 ms a trial at 210 dims.
    for number, trial in enumerate(shown):
        storage.create_new_trial(study_id, _frozen(trial, number))
    own = storage.get_trial(storage.create_new_trial(study_id))
    study = optuna.load_study(study_name="tpe", storage=storage)
    sampler = optuna.samplers.TPESampler(
        seed=int(rng.integers(2**32)), multivariate=True, n_startup_trials=0
    )
    # Dims of one choice are nothing to model. The sampler's order of dims is that of this table.
    free: dict[str, BaseDistribution] = {
        d.name: CategoricalDistribution(d.choices) for d in space.dims if len(d.choices) > 1
    }
    fixed = {d.name: d.choices[0] for d in space.dims if len(d.choices) == 1}

    def draw() -> SubnetConfig:
        drawn = fixed | sampler.sample_relative(study, own, free)
        return SubnetConfig({dim.name: drawn[dim.name] for dim in space.dims})

    return draw


def _frozen(trial: Trial, number: int) -> FrozenTrial:
    """Return the trial as Optuna has them; without values as one that still runs."""
    from optuna.trial import FrozenTrial, TrialState

    values = None if trial.failed else list(trial.values.values())
    frozen = FrozenTrial(
        number=number,
        state=TrialState.RUNNING if trial.failed else TrialState.COMPLETE,
        value=None,
        values=values,
        datetime_start=None,
        datetime_complete=None,
        params=dict(trial.config),
        distributions={},
        user_attrs={},
        system_attrs={},
        intermediate_values={},
        trial_id=number,
    )
    frozen.set_constraint("violation", trial.violation)
    return frozen
