"""What sub-networks lose, from the trials so far: a sum over their choices, by ridge regression.

Losses of single choices nearly add up (`elastune.allocate`), so that a linear model of the steps
from choice to choice predicts configurations that nobody tried. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from elastune.allocate import additive_loss
from elastune.search.base import Losses, Trial
from elastune.search.codes import codes_of
from elastune.space import SearchSpace, SubnetConfig

_RIDGES = (0.3, 3.0, 30.0)
"""Variance of the noise in that of a step, of which the likeliest is taken."""
_BENDS = (math.inf, 1.0, 0.2, -1.1)
"""How losses may depart from sums: in their median, from where on they grow exponentially with the
cuts; or, below 0, in the largest there is, where they level off (errors, at chance)."""
_MOST = 1e15  # losses that are larger count as this: single precision squares them
_FLOOR = 0.2
"""Spread of the steps of a dim that loses nothing by itself, in the mean spread."""


class Additivity(NamedTuple):
    """How well summed losses tell measured ones.

    Attributes:
        pearson: correlation of the sums with what was measured; NaN with fewer than three trials.
        spearman: correlation of their ranks.
        slope: measured loss per predicted loss (least squares): 1 where losses add up, more where
            cuts make each other worse.
        n: trials compared.
    """

    pearson: float
    spearman: float
    slope: float
    n: int

    @classmethod
    def of(cls, predicted: np.ndarray, measured: np.ndarray) -> Additivity:
        """Compare two arrays (trials,)."""
        if len(predicted) < 3 or np.ptp(predicted) == 0 or np.ptp(measured) == 0:
            return cls(math.nan, math.nan, math.nan, len(predicted))
        from scipy.stats import rankdata

        ranks = rankdata(predicted), rankdata(measured)
        centred = predicted - predicted.mean()
        return cls(
            float(np.corrcoef(predicted, measured)[0, 1]),
            float(np.corrcoef(*ranks)[0, 1]),
            float(centred @ measured / (centred @ centred)),
            len(predicted),
        )


def additivity(space: SearchSpace, losses: Losses, trials: Sequence[Trial]) -> Additivity:
    """Compare the sums of single-choice losses with the qualities measured in a search.

    Only trials count in which two choices or more differ from the largest: the others are what the
    losses were made from. A report gives this as how additive a super-network is.

    Raises:
        BadData: a dim of ``losses`` that the space lacks, or a choice without a loss.
    """
    largest = space.largest()
    joint = [
        trial
        for trial in _usable(trials)
        if sum(trial.config[name] != largest[name] for name in losses) >= 2
    ]
    sums = np.array([additive_loss(space, losses, trial.config) for trial in joint])
    measured = np.array([next(iter(trial.values.values())) for trial in joint])
    finite = np.isfinite(sums)
    return Additivity.of(sums[finite], measured[finite])


@dataclass(frozen=True)
class Additive:
    """A value of configurations as a sum over their choices, fitted to trials.

    The steps from each choice to the next smaller one add up to what a configuration loses;
    choices inside a block that is left out lose nothing. Ridge regression draws the steps towards
    a prior: single-choice losses times one slope, or else equal shares for all dims. Where losses
    compound, or level off, the sum is of losses on another scale: of a few, the likeliest.

    Attributes:
        base: value of the largest sub-network.
        steps: ``(steps,)``, sum of which is the bent loss.
        bend: loss from which on losses grow exponentially with the sum; below 0, minus the loss
            that they level off at; infinite where they are the sum.
        noise: standard deviation of a measurement around the sum, bent.
    """

    space: SearchSpace
    base: float
    steps: np.ndarray
    bend: float
    noise: float
    _fit: _Ridge = field(repr=False)
    _measured: np.ndarray = field(repr=False)

    @classmethod
    def fit(
        cls,
        space: SearchSpace,
        trials: Sequence[Trial],
        losses: Losses | None = None,
        *,
        value: str | None = None,
        bends: Sequence[float] = _BENDS,
    ) -> Additive:
        """Fit to the trials that did not fail.

        Args:
            space: of the trials.
            trials: at least one that did not fail.
            losses: single-choice losses, in any unit; the prior.
            value: which value is fitted; the quality by default.
            bends: to choose from; ``(math.inf,)`` for values that add up by themselves.
        """
        codes = codes_of(space)
        usable = [trial for trial in trials if not trial.failed]
        measured = np.array(
            [next(iter(t.values.values())) if value is None else t.values[value] for t in usable]
        )
        features = codes.features(codes.of([trial.config for trial in usable]))
        largest = [y for t, y in zip(usable, measured, strict=True) if t.config == codes.largest]
        base = float(largest[0] if largest else measured.min())
        prior = codes.prior(losses)
        sums = np.asarray(features @ prior.astype(np.float32), dtype=np.float64)
        beyond = np.clip(measured - base, -_MOST, _MOST)
        spread = np.abs(prior) if losses is not None else np.ones_like(prior)
        spread = spread / max(float(spread.mean()), 1e-300) + _FLOOR
        scales = _scales(beyond, bends)
        bent = [_bent(beyond, bend) for bend in scales]
        slopes = [float(sums @ x / max(float(sums @ sums), 1e-300)) for x in bent]
        targets = [x - slope * sums for x, slope in zip(bent, slopes, strict=True)]
        stretch = [_log_slope(beyond, bend) for bend in scales]
        which, ridge = _Ridge.likeliest(
            features * spread.astype(np.float32), targets, stretch, spread
        )
        steps = slopes[which] * prior + ridge.steps
        return cls(space, base, steps, scales[which], ridge.noise, ridge, measured)

    def predict(self, configs: Sequence[SubnetConfig]) -> np.ndarray:
        """Return the value that each configuration is expected to have; ``(n,)``."""
        codes = codes_of(self.space)
        return self.unbent(self.sums(codes.features(codes.of(configs))))

    def sums(self, features: np.ndarray) -> np.ndarray:
        """Return the summed steps of ``features``, (n, steps); ``(n,)``."""
        return np.asarray(features @ self.steps.astype(np.float32), dtype=np.float64)

    def unbent(self, sums: np.ndarray) -> np.ndarray:
        """Return the values that sums of steps stand for."""
        if math.isinf(self.bend):
            return self.base + sums
        part = np.abs(sums) / abs(self.bend)
        size = np.expm1(part) if self.bend > 0 else -np.expm1(-part)
        return self.base + abs(self.bend) * np.sign(sums) * size

    def growth(self, sums: np.ndarray) -> np.ndarray:
        """Return how much the value grows with its sum of steps, at some sums."""
        return np.exp(np.abs(sums) / self.bend)

    def losses(self) -> dict[str, dict[int, float]]:
        """Return each choice's loss as fitted, bent so that losses add up, for `allocate`."""
        return codes_of(self.space).losses(self.steps)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return steps that are as likely as the fit says (a sample of the posterior)."""
        return self.steps + self._fit.deviation(rng)

    def spread(self, features: np.ndarray) -> np.ndarray:
        """Return the standard deviations of the sums of ``features``, (n, steps), noise apart."""
        return self._fit.spread(features)

    @cached_property
    def additivity(self) -> Additivity:
        """How well each trial is told by a fit to all others."""
        bent = _bent(np.clip(self._measured - self.base, -_MOST, _MOST), self.bend)
        return Additivity.of(self.unbent(bent - self._fit.left_out()), self._measured)


@dataclass(frozen=True)
class _Ridge:
    """Bayesian linear regression of ``target`` (n,) on ``features`` (n, p).

    Scaled steps are drawn from N(0, noise^2 / ridge). Solved over trials or over steps, whichever
    are fewer.
    """

    features: np.ndarray
    target: np.ndarray
    scale: np.ndarray
    ridge: float
    factor: np.ndarray
    """Cholesky factor of the Gram matrix plus the ridge, lower."""
    noise: float

    @classmethod
    def likeliest(
        cls,
        features: np.ndarray,
        targets: Sequence[np.ndarray],
        log_slopes: Sequence[float],
        scale: np.ndarray,
    ) -> tuple[int, _Ridge]:
        """Return which target, and a fit to it, have the largest marginal likelihood.

        Args:
            features: (n, p), scaled.
            targets: the same measurements on several scales, (n,) each.
            log_slopes: for each, the summed logarithms of its slope over the measurements.
            scale: that the features were multiplied by, (p,).
        """
        n, p = features.shape
        gram = features @ features.T if n <= p else features.T @ features
        table = np.stack(targets, axis=1)
        least = 1e-12 * (table * table).sum(axis=0) + 1e-300
        found = []
        for ridge in _RIDGES:
            factor = np.linalg.cholesky(gram + ridge * np.eye(len(gram), dtype=gram.dtype))
            # log det(XX' / ridge + 1); over steps it is the same, with as many ones left out.
            volume = 2 * float(np.log(np.diag(factor)).sum()) - len(gram) * math.log(ridge)
            # The part of the targets that neither the steps nor their freedom explain.
            rest = table - features @ _solved(features, factor, table)
            noise = np.sqrt(np.maximum((table * rest).sum(axis=0), least) / n)
            likelihood = -n * np.log(noise) - 0.5 * volume + np.array(log_slopes)
            which = int(likelihood.argmax())
            fit = cls(features, table[:, which], scale, ridge, factor, float(noise[which]))
            found.append((float(likelihood[which]), which, fit))
        _, which, fit = max(found, key=lambda row: row[0])
        return which, fit

    @property
    def steps(self) -> np.ndarray:
        """Return the steps, unscaled."""
        return self._solve(self.target) * self.scale

    def _solve(self, target: np.ndarray) -> np.ndarray:
        """Return the scaled steps of some target."""
        return _solved(self.features, self.factor, target)

    def deviation(self, rng: np.random.Generator) -> np.ndarray:
        """Return a draw of the steps' deviation from their mean, unscaled (Matheron's rule)."""
        n, p = self.features.shape
        noise = rng.standard_normal(p), rng.standard_normal(n)
        own, others = (np.asarray(part, dtype=np.float32) for part in noise)
        steps = own * np.float32(self.noise / math.sqrt(self.ridge))
        seen = self.features @ steps + others * self.noise
        return (steps - self._solve(seen)) * self.scale

    def spread(self, features: np.ndarray) -> np.ndarray:
        """Return standard deviations of the predicted sums, ``(n,)``."""
        return self.noise * np.sqrt(self._variance(features * self.scale.astype(np.float32)))

    def _variance(self, x: np.ndarray) -> np.ndarray:
        """Return x' (X'X + ridge)^-1 x for scaled rows; ``(n,)``."""
        from scipy.linalg import solve_triangular

        if len(self.factor) == len(self.features):
            seen = solve_triangular(
                self.factor, self.features @ x.T, lower=True, check_finite=False
            )
            variance = ((x * x).sum(axis=1) - (seen * seen).sum(axis=0)) / self.ridge
        else:
            whitened = solve_triangular(self.factor, x.T, lower=True, check_finite=False)
            variance = (whitened * whitened).sum(axis=0)
        return np.maximum(variance, 0)

    def left_out(self) -> np.ndarray:
        """Return each target minus what the fit to the others says of it; ``(n,)``."""
        rest = self.target - self.features @ self._solve(self.target)
        leverage = self._variance(self.features)
        return rest / np.maximum(1 - leverage, 1e-6)


def _solved(features: np.ndarray, factor: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the scaled steps, (p, ...), that ridge regression finds for targets (n, ...)."""
    from scipy.linalg import cho_solve

    target = target.astype(features.dtype)
    if len(factor) == len(features):
        return np.asarray(features.T @ cho_solve((factor, True), target, check_finite=False))
    return np.asarray(cho_solve((factor, True), features.T @ target, check_finite=False))


def _usable(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if not trial.failed and not trial.dropped]


def _bent(losses: np.ndarray, bend: float) -> np.ndarray:
    """Return the sums that losses stand for; the slope at 0 is 1."""
    if math.isinf(bend):
        return losses
    part = np.abs(losses) / abs(bend)
    size = np.log1p(part) if bend > 0 else -np.log1p(-np.minimum(part, 1 - 1e-6))
    return abs(bend) * np.sign(losses) * size


def _log_slope(losses: np.ndarray, bend: float) -> float:
    """Return the sum of the logarithms of the slope of `_bent`."""
    if math.isinf(bend):
        return 0.0
    part = np.abs(losses) / abs(bend)
    return -float(np.log1p(part if bend > 0 else -np.minimum(part, 1 - 1e-6)).sum())


def _scales(losses: np.ndarray, bends: Sequence[float]) -> list[float]:
    """Return bends in the unit of the losses; no bend where there is too little to tell."""
    middle, most = float(np.median(np.abs(losses))), float(np.abs(losses).max())
    if middle == 0 or len(losses) < 4:
        return [math.inf]
    return [bend * (middle if bend > 0 else most) for bend in bends]
