"""The default: answers to budgets first, then whatever is expected to improve the front most.

An additive model of the quality (`elastune.search.surrogate`) is fitted to all trials for every
proposal. It says which sub-networks might lie on the front, and how far they are expected to push
it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from elastune.allocate import Knapsack
from elastune.search import hill_climb, milp
from elastune.search.base import Known, Trial, first_untried, non_dominated
from elastune.search.codes import Codes, codes_of
from elastune.search.history import History
from elastune.search.limits import violation
from elastune.search.surrogate import Additive
from elastune.space import SearchSpace, SubnetConfig

_WARM = 10  # trials before the first fit, where no losses are known
_DRAWS = 8  # of the model's steps
_PRICES = 12  # solutions for each draw
_CHILDREN = 96
_SCREENED = 24  # candidates whose costs are counted, where no limit is on them


def propose(
    space: SearchSpace, trials: Sequence[Trial], rng: np.random.Generator, known: Known
) -> SubnetConfig | None:
    """Return heuristic, largest and smallest first, then what promises most.

    Single-choice losses, where they are known, are solved for ``known.budgets`` and evenly spaced
    ones (`milp`). Without them a few random trials of all sizes come first. From then on proposals
    come in turns from two sources: solutions of the knapsack's Lagrangian relaxation for losses
    that are drawn as the fit says they may be (Thompson sampling), and offspring of the front. Of
    each the one of the largest expected hypervolume improvement is taken; one that is expected to
    keep the limits before any that is not.
    """
    history = History.of(trials)
    tried = history.tried
    config = first_untried(space, tried)
    if config is not None:
        return config
    usable = history.finished
    if known.losses is not None and usable:
        answers = milp.answers_of(space, trials, known)
        for budget in milp.seed_budgets(answers, space, known):
            config = answers.at(known.losses, budget)
            if config is not None and config not in tried:
                return config
    elif len(usable) < _WARM:
        for _ in range(_WARM):
            config = _of_any_size(codes_of(space), rng)
            if config not in tried:
                return config
        return hill_climb.propose(space, history, rng, known)
    return _Round(space, history, known).best(rng) or hill_climb.propose(space, history, rng, known)


def _of_any_size(codes: Codes, rng: np.random.Generator) -> SubnetConfig:
    """Draw a size evenly, then each dim's choice around it."""
    return codes.config(codes.canonical(rng.binomial(codes.sizes - 1, [[rng.random()]]))[0])


class _Round:
    """One proposal: the fit, the front, the candidates and what is expected of them."""

    def __init__(self, space: SearchSpace, trials: History, known: Known) -> None:
        self.space, self.known, self.trials = space, known, trials
        self.codes = codes_of(space)
        self.model = Additive.fit(space, trials, known.losses)
        self.knapsack = milp.answers_of(space, trials, known).knapsack
        kept = [trial for trial in trials if trial.violation <= 0]
        self.front = non_dominated(kept) or list(trials.front)

    def best(self, rng: np.random.Generator) -> SubnetConfig | None:
        """Return the candidate that promises most; None where all were tried."""
        if not self.front:
            return None
        rows = self._untried(self._solutions(rng) if len(self.trials) % 2 else self._children(rng))
        if len(rows) > _SCREENED and len(self.known.values) == 2 and not self.known.limits:
            features = self.codes.features(rows)
            rough = self._rough_costs(rows)
            gains = self._gains(self._quality(features) | rough, self._spread(features), rng)
            rows = rows[np.argsort(-gains, kind="stable")[:_SCREENED]]
        configs = [self.codes.config(row) for row in rows]
        if not configs:
            return None
        features = self.codes.features(rows)
        values = self._costs(configs) | self._quality(features)
        gains = self._gains(values, self._spread(features), rng)
        misses = [
            violation({name: column[i] for name, column in values.items()}, self.known.limits)
            for i in range(len(configs))
        ]
        return configs[min(range(len(configs)), key=lambda i: (misses[i], -gains[i], i))]

    def _untried(self, found: np.ndarray) -> np.ndarray:
        """Return each candidate once, in their order, without those that were tried."""
        seen = self.codes.canonical(self.codes.of([trial.config for trial in self.trials]))
        tried = {row.tobytes() for row in seen}
        rows = self.codes.canonical(found)
        once = list({row.tobytes(): i for i, row in reversed(list(enumerate(rows)))}.items())
        return rows[[i for code, i in reversed(once) if code not in tried]]

    def _solutions(self, rng: np.random.Generator) -> np.ndarray:
        """Return the best codes at some prices of the cost, for drawn losses; ``(n, dims)``."""
        draws = [self.model.draw(rng) for _ in range(_DRAWS)]
        found = [relaxed(self.codes, self.knapsack, steps, _PRICES, rng) for steps in draws]
        return cast(np.ndarray, rng.permutation(np.concatenate(found)))

    def _children(self, rng: np.random.Generator) -> np.ndarray:
        """Return codes of the front, crossed with near ones and changed a little; ``(n, dims)``."""
        front = sorted(self.front, key=lambda trial: tuple(trial.values.values())[1:])
        codes = self.codes.of([trial.config for trial in front]).astype(np.int64)
        first = rng.integers(len(codes), size=_CHILDREN)
        near = np.clip(first + rng.integers(-2, 3, _CHILDREN), 0, len(codes) - 1)
        crossed = rng.random((_CHILDREN, codes.shape[1])) < rng.random((_CHILDREN, 1))
        children = np.where(crossed, codes[near], codes[first])
        rate = rng.choice([1.0, 2.0, 5.0], (_CHILDREN, 1)) / codes.shape[1]
        steps = np.where(rng.random(children.shape) < rate, rng.choice([-1, 1], children.shape), 0)
        return np.clip(children + steps, 0, self.codes.sizes - 1)

    def _quality(self, features: np.ndarray) -> dict[str, np.ndarray]:
        """Return the column of the predicted quality."""
        return {self.known.values[0]: self.model.unbent(self.model.sums(features))}

    def _rough_costs(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return the column of the second value, as if it added up over choices."""
        table = self.codes.table(self.knapsack.costs)
        saved = table[np.arange(rows.shape[1]), rows].sum(axis=1)
        return {self.known.values[1]: self.knapsack.base_cost + saved}

    def _costs(self, configs: Sequence[SubnetConfig]) -> dict[str, np.ndarray]:
        """Return the column of each cost, counted, or else fitted."""
        found: dict[str, np.ndarray] = {}
        if self.known.costs is not None:
            counts = [self.known.costs(config) for config in configs]
            found = {name: np.array([count[name] for count in counts]) for name in counts[0]}
        for name in self.known.values[1:]:
            if name not in found:
                fitted = Additive.fit(self.space, self.trials, value=name, bends=(math.inf,))
                found[name] = fitted.predict(configs)
        return found

    def _spread(self, features: np.ndarray) -> np.ndarray:
        """Return the standard deviation of each predicted quality; ``(n,)``."""
        bent = np.hypot(self.model.spread(features), self.model.noise)
        return bent * self.model.growth(self.model.sums(features))

    def _gains(
        self, values: Mapping[str, np.ndarray], spread: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Return what each candidate is expected to gain; ``(n,)``."""
        names = self.known.values
        front = np.array([[trial.values[name] for name in names] for trial in self.front])
        found = np.stack([values[name] for name in names], axis=1)
        if len(names) > 2:
            return -_farthest(found, front, rng)
        if len(names) == 1:
            front = np.append(front, np.zeros((len(front), 1)), axis=1)
            return expected_gain(
                found[:, 0], spread, np.zeros(len(found)), front, (float(front[:, 0].max()), 1.0)
            )
        worst = front.max(axis=0) + 0.1 * np.ptp(front, axis=0)
        most = [self.known.limits.get(name, (-math.inf, math.inf))[1] for name in names]
        corner = np.minimum(worst, most)
        corner = (float(corner[0]), float(corner[1]))
        return expected_gain(found[:, 0], spread, found[:, 1], front, corner)


def _farthest(values: np.ndarray, front: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the largest weighted distance from the front's ideal, for weights that are drawn."""
    span = np.ptp(front, axis=0)
    scaled = (values - front.min(axis=0)) / np.where(span > 0, span, 1.0)
    weights = rng.dirichlet(np.ones(values.shape[1]))
    return cast(np.ndarray, (weights * scaled).max(axis=1))


def expected_gain(
    means: np.ndarray,
    spread: np.ndarray,
    costs: np.ndarray,
    front: np.ndarray,
    corner: tuple[float, float],
) -> np.ndarray:
    """Return the expected hypervolume improvement of candidates whose quality alone is uncertain.

    The area that a candidate adds is a sum, over the stretches of cost beyond its own, of a
    stretch's length times how far the candidate is below the best quality there; the expectation of
    the latter for a normal quality is the expected improvement (Mockus, 1978).

    Args:
        means: expected quality, (n,).
        spread: its standard deviation, (n,).
        costs: (n,).
        front: quality and cost of what is there, (m, 2).
        corner: quality and cost beyond which nothing counts.

    Returns:
        ``(n,)``, in units of quality times cost.
    """
    from scipy.special import ndtr

    front = front[np.argsort(front[:, 1], kind="stable")]
    best = np.minimum(np.minimum.accumulate(np.append(corner[0], front[:, 0])), corner[0])
    starts = np.append(-np.inf, front[:, 1])
    ends = np.minimum(np.append(front[:, 1], corner[1]), corner[1])
    lengths = np.maximum(ends - np.maximum(starts, costs[:, None]), 0.0)
    deviation = np.maximum(spread, 1e-12 * (np.abs(means) + 1e-300))[:, None]
    z = (best - means[:, None]) / deviation
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    improvement = deviation * (z * ndtr(z) + density)
    return cast(np.ndarray, (lengths * improvement).sum(axis=1))


def relaxed(
    codes: Codes, knapsack: Knapsack, steps: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Return codes of the least loss plus price times cost, for prices that are drawn.

    The Lagrangian relaxation of the knapsack: each dim by itself, so that it takes microseconds.
    Prices are drawn such that costs spread evenly.

    Args:
        codes: of the space.
        knapsack: holds what each choice costs.
        steps: what each step loses, (steps,).
        count: how many.
        rng: draws the prices.

    Returns:
        ``(count, dims)``.
    """
    losses, costs = codes.levels(steps), codes.table(knapsack.costs)
    saved = np.where(np.isfinite(losses), costs[:, :1] - costs, 0.0)[:, 1:]
    lost = np.where(np.isfinite(losses), losses, 0.0)[:, 1:]
    worth = np.maximum(lost, 0.0)[saved > 0] / saved[saved > 0]
    if len(worth):
        order = np.argsort(worth, kind="stable")
        share = np.cumsum(saved[saved > 0][order])
        places = np.searchsorted(share / share[-1], rng.random(count))
        prices = worth[order][np.minimum(places, len(order) - 1)] * np.exp(
            rng.normal(0, 0.1, count)
        )
    else:
        prices = np.zeros(count)
    totals = losses + prices[:, None, None] * np.where(np.isfinite(losses), costs, 0.0)
    found = totals.argmin(axis=2)
    _leave_out(codes, totals, found)
    return found


def _leave_out(codes: Codes, totals: np.ndarray, found: np.ndarray) -> None:
    """Leave out the blocks whose best choices together are worse than none; never all of them."""
    blocks = codes.blocks
    if not len(blocks):
        return
    inside = np.zeros(found.shape)
    owned = np.flatnonzero(codes.owner >= 0)
    for dim in owned:
        inside[:, codes.owner[dim]] += totals[:, dim].min(axis=1)
    margin = totals[:, blocks, 1] - totals[:, blocks, 0] - inside[:, blocks]
    gone = margin < 0
    everything = gone.all(axis=1)
    gone[everything, margin[everything].argmax(axis=1)] = False
    found[:, blocks] = gone
