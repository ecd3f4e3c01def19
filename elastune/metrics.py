"""Metrics of the records that an evaluation leaves: one record per example, one number at the end.

A metric names the fields (columns) of the records it reads. Where there is a formula for its
standard error it is given here; `elastune.statistics` bootstraps the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Record = dict[str, Any]
"""What is known of one scored example; ``index`` is its place among the examples."""


@dataclass(frozen=True)
class Metric:
    """A number computed from records.

    Attributes:
        name: as in ``metrics.json``.
        unit: ``fraction``, ``correlation`` or ``perplexity``.
        higher_is_better: whether a larger value is the better one.
        columns: fields of the records, in the order in which ``value`` takes them as float arrays.
        value: arrays (n,) -> the metric. ``nan`` where it is not defined.
        stderr: arrays (n,) -> one standard error, same unit; None asks for the bootstrap.
        count: the field whose sum is the sample size; None counts records.
    """

    name: str
    unit: str
    higher_is_better: bool
    columns: tuple[str, ...]
    value: Callable[..., float]
    stderr: Callable[..., float] | None = None
    count: str | None = None

    def arrays(self, records: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, ...]:
        """Return the columns of ``records`` as float64 arrays."""
        return tuple(
            np.array([record[name] for record in records], dtype=np.float64)
            for name in self.columns
        )


def mean(values: np.ndarray) -> float:
    """Return the mean."""
    return float(values.mean())


def mean_stderr(values: np.ndarray) -> float:
    """Return the standard error of a mean, sqrt(sum((x - mean)^2) / (n - 1) / n).

    All right or all wrong answers (0 and 1 alone) have no spread but are no certainty: there it is
    the half-width of Wilson's score interval at one standard deviation, 1 / (2 (n + 1)) (Wilson,
    1927). A single value of another kind gives ``nan``.
    """
    n = len(values)
    if np.ptp(values) == 0 and values[0] in (0, 1):
        return 0.5 / (n + 1)
    return float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def _mean_of(name: str, column: str, unit: str = "fraction") -> Metric:
    return Metric(name, unit, True, (column,), mean, mean_stderr)


def matthews(prediction: np.ndarray, gold: np.ndarray) -> float:
    """Return Matthews' correlation of two classes (0 when either is constant, as scikit-learn)."""
    covariance = float(np.mean(prediction * gold) - prediction.mean() * gold.mean())
    spread = float(prediction.std() * gold.std())
    return covariance / spread if spread > 0 else 0.0


def f1(prediction: np.ndarray, gold: np.ndarray) -> float:
    """Return F1 of class 1: 2 TP / (2 TP + FP + FN), 0 when class 1 never occurs."""
    hits = float(((prediction == 1) & (gold == 1)).sum())
    named = float((prediction == 1).sum() + (gold == 1).sum())
    return 2 * hits / named if named else 0.0


def pearson(prediction: np.ndarray, gold: np.ndarray) -> float:
    """Return Pearson's correlation; ``nan`` when either side is constant."""
    if np.ptp(prediction) == 0 or np.ptp(gold) == 0:
        return math.nan
    return float(np.corrcoef(prediction, gold)[0, 1])


def spearman(prediction: np.ndarray, gold: np.ndarray) -> float:
    """Return Spearman's correlation: Pearson's of the ranks, ties sharing their mean rank."""
    return pearson(_ranks(prediction), _ranks(gold))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def perplexity(nll: np.ndarray, tokens: np.ndarray) -> float:
    """Return exp(sum of negative log-likelihoods in nats / tokens)."""
    loss = float(nll.sum() / tokens.sum())
    return math.exp(loss) if loss < 700 else math.inf


def perplexity_stderr(nll: np.ndarray, tokens: np.ndarray) -> float:
    """Return its standard error by the delta method; texts are the independent units.

    Ratio estimator: Cochran, Sampling Techniques, 3rd ed., eq. 6.13. ``nan`` for a single text.
    """
    n = int((tokens > 0).sum())
    if n < 2:
        return math.nan
    residual = nll - nll.sum() / tokens.sum() * tokens
    variance = n / (n - 1) * float((residual**2).sum()) / float(tokens.sum()) ** 2
    return perplexity(nll, tokens) * math.sqrt(variance)


ACCURACY = _mean_of("accuracy", "correct")
ACCURACY_NORM = _mean_of("accuracy_norm", "correct_norm")
"""Multiple choice by log-likelihood per character of the choice (lm-evaluation-harness)."""
EXACT_MATCH = _mean_of("exact_match", "exact")
TOKEN_F1 = _mean_of("token_f1", "f1")
"""SQuAD's F1: mean over questions of the F1 of the answer's words."""
MATTHEWS = Metric("matthews", "correlation", True, ("prediction", "gold"), matthews)
F1 = Metric("f1", "fraction", True, ("prediction", "gold"), f1)
PEARSON = Metric("pearson", "correlation", True, ("prediction", "gold"), pearson)
SPEARMAN = Metric("spearman", "correlation", True, ("prediction", "gold"), spearman)
PERPLEXITY = Metric(
    "perplexity",
    "perplexity",
    False,
    ("nll", "tokens"),
    perplexity,
    perplexity_stderr,
    count="tokens",
)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        *(ACCURACY, ACCURACY_NORM, EXACT_MATCH, TOKEN_F1),
        *(MATTHEWS, F1, PEARSON, SPEARMAN, PERPLEXITY),
    )
}
