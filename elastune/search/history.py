"""The trials so far, and what algorithms ask of them at every proposal."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import overload

import numpy as np

from elastune.search.base import Trial, non_dominated
from elastune.space import SubnetConfig


class Tried(Collection[SubnetConfig]):
    """The configurations of a history; of an index that goes on, those in its first trials."""

    def __init__(self, places: dict[SubnetConfig, int], n: int) -> None:
        self._places = places
        self._n = n

    def __contains__(self, config: object) -> bool:
        return self._places.get(config, self._n) < self._n  # type: ignore[call-overload,no-any-return]

    def __iter__(self) -> Iterator[SubnetConfig]:
        return (config for config, place in self._places.items() if place < self._n)

    def __len__(self) -> int:
        return sum(1 for _ in self) if len(self._places) > self._n else len(self._places)


class History(Sequence[Trial]):
    """Trials in the order of their numbers, unchanging.

    One that is `grown` from another takes over what that one knew: a proposal does not pass over
    all trials again, and a search of n trials takes time in proportion to n, not to its square.
    """

    def __init__(self, trials: Sequence[Trial] = ()) -> None:
        self._trials = tuple(trials)
        self._has_grown = False
        self._places: dict[SubnetConfig, int] = {}
        for place, trial in enumerate(self._trials):
            self._places.setdefault(trial.config, place)

    @classmethod
    def of(cls, trials: Sequence[Trial]) -> History:
        """Return the trials as a history; what is one stays as it is."""
        return trials if isinstance(trials, History) else cls(trials)

    def grown(self, trials: Sequence[Trial]) -> History:
        """Return a history of ``trials``, of which these are the first, or else a new one."""
        n = len(self)
        same = len(trials) >= n and all(map(operator.is_, self._trials, trials))
        # The index is handed on once: another history may have gone on from here in another way.
        if not same or self._has_grown:
            return History(trials)
        self._has_grown = True
        new = trials[n:]
        found = History()
        found._trials = (*self._trials, *new)
        found._places = self._places
        for place, trial in enumerate(new, start=n):
            found._places.setdefault(trial.config, place)
        known, added = vars(self), _finished(new)
        if "finished" in known:
            found.finished = (*self.finished, *added)
        if "values" in known and len(self.values) and added:
            found.values = np.concatenate([self.values, _values(added)])
        if "violations" in known:
            found.violations = np.append(self.violations, _violations(added))
        if "front" in known:
            found.front = tuple(non_dominated([*self.front, *new]))
        return found

    @property
    def tried(self) -> Tried:
        """Every configuration, failed and running ones, too."""
        return Tried(self._places, len(self))

    @cached_property
    def finished(self) -> tuple[Trial, ...]:
        """The trials that have values."""
        return _finished(self)

    @cached_property
    def values(self) -> np.ndarray:
        """The values of those that have any, ``(finished, values)``."""
        return _values(self.finished)

    @cached_property
    def violations(self) -> np.ndarray:
        """By how much those miss the limits, ``(finished,)``."""
        return _violations(self.finished)

    @cached_property
    def front(self) -> tuple[Trial, ...]:
        """The Pareto front: see `non_dominated`."""
        return tuple(non_dominated(self))

    @overload
    def __getitem__(self, index: int) -> Trial: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Trial, ...]: ...
    def __getitem__(self, index: int | slice) -> Trial | tuple[Trial, ...]:
        return self._trials[index]

    def __iter__(self) -> Iterator[Trial]:
        return iter(self._trials)

    def __len__(self) -> int:
        return len(self._trials)


def _finished(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    return tuple(trial for trial in trials if not trial.failed)


def _values(trials: Sequence[Trial]) -> np.ndarray:
    return np.array([trial.rank[:-1] for trial in trials], dtype=np.float64)


def _violations(trials: Sequence[Trial]) -> np.ndarray:
    return np.array([trial.violation for trial in trials], dtype=np.float64)
