"""Search: propose a configuration, measure it, remember it. Knows spaces and numbers, never torch.

An algorithm is a stateless function of the history: ``propose(space, trials, rng)`` with
``rng = (seed, trial number)``. Resuming and repeating then need no saved state but the trials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastune.errors import ElastuneError
from elastune.space import SearchSpace, SubnetConfig

Objective = Callable[[SubnetConfig], Mapping[str, float]]
"""Configuration -> named values, all to be minimised; the first is the quality."""


@dataclass(frozen=True)
class Trial:
    """A configuration and what was measured of it."""

    number: int
    config: SubnetConfig
    values: Mapping[str, float]


Propose = Callable[[SearchSpace, Sequence[Trial], np.random.Generator], SubnetConfig]


@dataclass(frozen=True)
class SearchResult:
    """All trials of a search."""

    trials: tuple[Trial, ...]

    def best(self) -> Trial:
        """Return the trial of the best quality; of equals, the cheapest, then the earliest.

        Raises:
            ElastuneError: nothing was tried.
        """
        if not self.trials:
            raise ElastuneError("the search tried nothing", try_="search.trials of at least 1")
        return min(self.trials, key=lambda trial: (*trial.values.values(), trial.number))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: trials, numbers of the Pareto front, number of the best."""
        return {
            "schema": 1,
            "trials": [
                {"number": t.number, "config": dict(t.config), "values": dict(t.values)}
                for t in self.trials
            ],
            "pareto": [trial.number for trial in self.pareto()],
            "best": self.best().number if self.trials else None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchResult:
        """Read back what `to_dict` returned."""
        return cls(
            tuple(
                Trial(row["number"], SubnetConfig(row["config"]), row["values"])
                for row in data["trials"]
            )
        )

    def pareto(self) -> list[Trial]:
        """Return the trials that no other is at least as good as in every value, and better in one.

        Of trials with equal values the earliest stays.
        """
        front: list[Trial] = []
        for trial in self.trials:
            if not any(_dominates(other, trial) for other in self.trials):
                front.append(trial)
        return front


def _dominates(a: Trial, b: Trial) -> bool:
    mine, theirs = tuple(a.values.values()), tuple(b.values.values())
    if mine == theirs:
        return a.number < b.number
    return all(x <= y for x, y in zip(mine, theirs, strict=True))
