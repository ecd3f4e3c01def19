"""Configurations of a space as arrays: indices of choices, and the steps from choice to choice."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import numpy as np

from elastune.allocate import owners
from elastune.search.base import Losses
from elastune.space import SearchSpace, SubnetConfig

_KEPT = 20_000  # configurations whose codes are kept for a space


class Codes:
    """A space's configurations as arrays: indices of choices, and the steps that they take."""

    def __init__(self, space: SearchSpace) -> None:
        self.largest = space.largest()
        self._names = [dim.name for dim in space.dims]
        self._choices = [dim.choices for dim in space.dims]
        self._index = [{c: i for i, c in enumerate(dim.choices)} for dim in space.dims]
        sizes = [len(dim.choices) for dim in space.dims]
        self.sizes = np.array(sizes)
        depth = [d.kind == "depth" and d.choices == (1, 0) for d in space.dims]
        self.blocks = np.flatnonzero(depth)
        self.dim_of = np.repeat(np.arange(len(sizes)), [size - 1 for size in sizes])
        self.step_of = np.concatenate([np.arange(1, size) for size in sizes]).astype(np.int16)
        place = {name: i for i, name in enumerate(self._names)}
        self.owner = np.full(len(sizes), -1)
        for name, owner in owners(space).items():
            self.owner[place[name]] = place[owner]
        self._owned = np.flatnonzero(self.owner[self.dim_of] >= 0)
        self._known: dict[SubnetConfig, np.ndarray] = {}

    def of(self, configs: Sequence[SubnetConfig]) -> np.ndarray:
        """Return the indices of the choices, ``(n, dims)`` int16."""
        if len(self._known) > _KEPT:
            self._known.clear()
        rows = []
        for config in configs:
            row = self._known.get(config)
            if row is None:
                pairs = zip(self._index, self._names, strict=True)
                row = np.array([index[config[name]] for index, name in pairs], dtype=np.int16)
                self._known[config] = row
            rows.append(row)
        return np.array(rows, dtype=np.int16).reshape(len(rows), len(self._names))

    def canonical(self, codes: np.ndarray) -> np.ndarray:
        """Return the codes with what is inside left-out blocks at its largest; ``(n, dims)``."""
        inert = (self.owner >= 0) & (codes[:, self.owner] > 0)
        return np.where(inert, 0, codes).astype(np.int16)

    def config(self, code: np.ndarray) -> SubnetConfig:
        """Return the configuration of one row."""
        return SubnetConfig(
            {n: c[i] for n, c, i in zip(self._names, self._choices, code.tolist(), strict=True)}
        )

    def features(self, codes: np.ndarray) -> np.ndarray:
        """Return which steps are taken, ``(n, steps)`` float32; none inside left-out blocks."""
        taken = (codes[:, self.dim_of] >= self.step_of).astype(np.float32)
        if len(self._owned):
            owner = self.owner[self.dim_of[self._owned]]
            taken[:, self._owned] *= codes[:, owner] == 0
        return taken

    def levels(self, steps: np.ndarray) -> np.ndarray:
        """Return the sum of the steps up to each choice, ``(dims, choices)``; infinite beyond."""
        found = np.full((len(self.sizes), int(self.sizes.max())), math.inf)
        found[:, 0] = 0.0
        found[self.dim_of, self.step_of] = steps
        return np.cumsum(found, axis=1)

    def table(self, column: np.ndarray) -> np.ndarray:
        """Return one number for each choice of each dim as ``(dims, choices)``, padded with 0."""
        found = np.zeros((len(self.sizes), int(self.sizes.max())))
        found[np.arange(found.shape[1]) < self.sizes[:, None]] = column
        return found

    def prior(self, losses: Losses | None) -> np.ndarray:
        """Return what each step loses: by single-choice losses, or all dims the same; ``(steps,)``.

        Dims without losses take the mean step. A choice whose loss is not finite loses twice the
        most that any other does.
        """
        if losses is None:
            return 1.0 / np.bincount(self.dim_of)[self.dim_of]
        finite = [abs(x) for of_dim in losses.values() for x in of_dim.values() if math.isfinite(x)]
        most = 2 * max(finite, default=1.0)
        steps = np.full(len(self.dim_of), math.nan)
        for dim, name in enumerate(self._names):
            if name in losses:
                levels = [losses[name][choice] for choice in self._choices[dim]]
                levels = [x if math.isfinite(x) else most for x in levels]
                steps[self.dim_of == dim] = np.diff(levels)
        known = steps[~np.isnan(steps)]
        return np.where(np.isnan(steps), known.mean() if len(known) else 1.0, steps)

    def losses(self, steps: np.ndarray) -> dict[str, dict[int, float]]:
        """Return dim -> choice -> sum of the steps up to there."""
        return {
            name: dict(
                zip(
                    self._choices[dim],
                    [0.0, *np.cumsum(steps[self.dim_of == dim]).tolist()],
                    strict=True,
                )
            )
            for dim, name in enumerate(self._names)
        }


_CODES: weakref.WeakKeyDictionary[SearchSpace, Codes] = weakref.WeakKeyDictionary()


def codes_of(space: SearchSpace) -> Codes:
    """Return the arrays of a space, made once."""
    found = _CODES.get(space)
    if found is None:
        found = _CODES[space] = Codes(space)
    return found
