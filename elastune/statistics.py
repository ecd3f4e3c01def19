"""Standard errors, and whether two systems differ on the same examples.

Examples are the independent units throughout: another draw of examples is the chance that errors
and p-values speak of. Neither says anything of another training seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastune.errors import BadData
from elastune.metrics import PEARSON, SPEARMAN, Metric, Record, mean, pearson

Arrays = tuple[np.ndarray, ...]

RESAMPLES = 1000
"""Bootstrap resamples of a standard error or an interval."""
PERMUTATIONS = 2000
"""Random exchanges of a paired test: p is no smaller than 1 / (PERMUTATIONS + 1)."""
_SAME = ("gold", "tokens")  # what two records of one example have in common, whatever the system


@dataclass(frozen=True)
class Comparison:
    """One system's metric minus another's, on the examples that both scored.

    Attributes:
        metric: name of the metric.
        difference: ours - theirs, in the metric's unit; as are ``low`` and ``high``.
        low: lower end of the confidence interval of the difference.
        high: upper end.
        p: two-sided p-value of "both systems are equally good"; never 0.
        n: examples that were compared.
        higher_is_better: of the metric.
        confidence: of the interval; a difference counts when p < 1 - confidence.
        test: what p and the interval come from, in words.
    """

    metric: str
    difference: float
    low: float
    high: float
    p: float
    n: int
    higher_is_better: bool
    confidence: float
    test: str

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, ``within noise``; ``unknown`` where the metric is undefined."""
        if math.isnan(self.difference) or math.isnan(self.p):
            return "unknown"
        # 1 - 0.95 is a little above 0.05 in binary.
        if self.p >= round(1 - self.confidence, 12) or self.difference == 0:
            return "within noise"
        return "better" if (self.difference > 0) == self.higher_is_better else "worse"


def stderr(metric: Metric, records: Sequence[Record], seed: int = 0) -> float:
    """Return one standard error of ``metric``, in its unit: by its formula, else by the bootstrap.

    The bootstrap draws as many records as there are, with replacement, ``RESAMPLES`` times and
    takes the standard deviation of the metric (Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, algorithm 6.1). Resamples on which it is not defined are left out.

    Returns:
        ``nan`` where there is too little to tell: fewer than two records, or a metric that is not
        defined on most resamples.
    """
    n = len(records)
    if n == 0:
        return math.nan
    columns = metric.arrays(records)
    if metric.stderr is not None:
        return metric.stderr(*columns)
    if n < 2 or not math.isfinite(metric.value(*columns)):
        return math.nan
    value, columns, _ = _prepared(metric, columns, columns)
    values = _bootstrap(lambda drawn: value(*(c[drawn] for c in columns)), n, seed)
    return float(values.std(ddof=1)) if len(values) > RESAMPLES // 2 else math.nan


def compare(
    metric: Metric,
    ours: Sequence[Record],
    theirs: Sequence[Record],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two systems on the examples (records of the same ``index``) that both scored.

    Means of 0 and 1 (accuracy, exact match): p by McNemar's exact test, the sign test of the
    examples that one system alone got right (McNemar, 1947); interval by the adjusted Wald method
    for paired proportions (Bonett and Price, 2012). Other means: p by random sign flips of the
    differences, interval by Student's t. Further metrics: p by approximate randomisation, which
    exchanges the two systems' records example by example (Noreen, Computer Intensive Methods for
    Testing Hypotheses, 1989), interval by percentiles of the paired bootstrap (Koehn, 2004).

    Raises:
        BadData: no example in common, an index that occurs twice, or two examples of one index
            that have different gold answers.
    """
    pairs = _paired(ours, theirs)
    left = metric.arrays([a for a, _ in pairs])
    right = metric.arrays([b for _, b in pairs])
    if metric.value is not mean:
        found = _compare_any(metric, left, right, confidence, seed)
    elif np.isin(left[0], (0, 1)).all() and np.isin(right[0], (0, 1)).all():
        found = _compare_binary(left[0], right[0], confidence)
    else:
        found = _compare_means(left[0] - right[0], confidence, seed)
    low, high, p, test = found
    return Comparison(
        metric=metric.name,
        difference=metric.value(*left) - metric.value(*right),
        low=low,
        high=high,
        p=p,
        n=len(pairs),
        higher_is_better=metric.higher_is_better,
        confidence=confidence,
        test=test,
    )


def _paired(ours: Sequence[Record], theirs: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Match records by index, in its order."""
    left, right = _by_index(ours), _by_index(theirs)
    shared = sorted(left.keys() & right.keys())
    if not shared:
        raise BadData(
            f"{len(left)} and {len(right)} records have no example in common to compare on",
            try_="score both systems on the same examples",
        )
    pairs = [(left[index], right[index]) for index in shared]
    for a, b in pairs:
        for name in _SAME:
            if name in a and name in b and a[name] != b[name]:
                raise BadData(
                    f"example {a['index']} has {name} {_short(a[name])} on one side and "
                    f"{_short(b[name])} on the other: these are not the same examples",
                    try_="score both systems on the same examples",
                )
    return pairs


def _short(value: Any) -> str:
    return repr(value)[:60]


def _by_index(records: Sequence[Record]) -> dict[int, Record]:
    found = {record["index"]: record for record in records}
    if len(found) < len(records):
        raise BadData(
            f"{len(records)} records have {len(found)} indices: some occur twice",
            try_="records of one evaluation, each example once",
        )
    return found


def _compare_binary(
    left: np.ndarray, right: np.ndarray, confidence: float
) -> tuple[float, float, float, str]:
    from scipy import stats

    n = len(left)
    only_left, only_right = int((left > right).sum()), int((left < right).sum())
    apart = only_left + only_right
    p = stats.binomtest(only_left, apart).pvalue if apart else 1.0
    # Bonett and Price, J. Educ. Behav. Stat. 37(4): one example more in both unequal cells.
    a, b = (only_left + 1) / (n + 2), (only_right + 1) / (n + 2)
    half = stats.norm.ppf((1 + confidence) / 2) * math.sqrt((a + b - (a - b) ** 2) / (n + 2))
    low, high = max(a - b - half, -1.0), min(a - b + half, 1.0)
    return float(low), float(high), max(float(p), 1e-300), "McNemar's exact test"


def _compare_means(
    differences: np.ndarray, confidence: float, seed: int
) -> tuple[float, float, float, str]:
    from scipy import stats

    n, middle = len(differences), float(differences.mean())
    if n < 2:
        return math.nan, math.nan, 1.0, "sign flips"
    spread = float(differences.std(ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * spread
    rng = np.random.default_rng(seed)
    flipped = np.array([differences @ _signs(rng, n) for _ in range(PERMUTATIONS)]) / n
    return middle - half, middle + half, _p_value(flipped, middle), "sign flips"


def _signs(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(0, 2, n, dtype=np.int8) * 2.0 - 1.0


def _compare_any(
    metric: Metric, left: Arrays, right: Arrays, confidence: float, seed: int
) -> tuple[float, float, float, str]:
    n = len(left[0])
    value, left, right = _prepared(metric, left, right)

    def gap(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
        return value(*ours) - value(*theirs)

    difference = gap(left, right)
    if not math.isfinite(difference):
        return math.nan, math.nan, math.nan, "approximate randomisation"
    rng = np.random.default_rng(seed)
    swapped = np.full(PERMUTATIONS, math.nan)
    for place in range(PERMUTATIONS):
        swap = rng.integers(0, 2, n, dtype=np.int8).astype(bool)
        ours = [np.where(swap, b, a) for a, b in zip(left, right, strict=True)]
        theirs = [np.where(swap, a, b) for a, b in zip(left, right, strict=True)]
        swapped[place] = gap(ours, theirs)
    drawn = _bootstrap(lambda i: gap([c[i] for c in left], [c[i] for c in right]), n, seed)
    tail = 50 * (1 - confidence)
    low = high = math.nan
    if n > 1 and len(drawn) > RESAMPLES // 2:
        low, high = np.percentile(drawn, (tail, 100 - tail))
    p = _p_value(swapped[np.isfinite(swapped)], difference)
    return float(low), float(high), p, "approximate randomisation"


def _prepared(
    metric: Metric, left: Arrays, right: Arrays
) -> tuple[Callable[..., float], Arrays, Arrays]:
    """Return the metric's function with columns that it gives the same value on.

    Predictions of two systems are exchangeable only on one scale: correlations do not see the
    scale, so each system's predictions are standardised (Pearson) or ranked (Spearman).
    """
    if metric is PEARSON:
        return pearson, (_standardised(left[0]), *left[1:]), (_standardised(right[0]), *right[1:])
    if metric is not SPEARMAN:
        return metric.value, left, right
    scores = np.unique([_ranks(left[0]), _ranks(right[0])], return_inverse=True)[1]
    gold = np.unique(left[1], return_inverse=True)[1]
    scores = scores.reshape(2, -1)
    return _spearman_of_codes, (scores[0], gold), (scores[1], gold)


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / (values.std() or 1.0)


def _ranks(values: np.ndarray) -> np.ndarray:
    return _ranks_of_codes(np.unique(values, return_inverse=True)[1])


def _spearman_of_codes(prediction: np.ndarray, gold: np.ndarray) -> float:
    """Spearman's correlation of small whole numbers: counted instead of sorted."""
    return pearson(_ranks_of_codes(prediction), _ranks_of_codes(gold))


def _ranks_of_codes(codes: np.ndarray) -> np.ndarray:
    counts = np.bincount(codes)
    return (np.cumsum(counts) - (counts - 1) / 2)[codes]


def _p_value(permuted: np.ndarray, observed: float) -> float:
    """Share of exchanges at least as extreme; what was observed counts among them."""
    # Sums in another order differ in the last bits: those are ties, not less extreme.
    reached = int((np.abs(permuted) >= abs(observed) * (1 - 1e-9) - 1e-15).sum())
    return (reached + 1) / (len(permuted) + 1)


def _bootstrap(statistic: Callable[[np.ndarray], float], n: int, seed: int) -> np.ndarray:
    """Return the finite values of ``statistic`` on indices ``(n,)`` drawn with replacement."""
    rng = np.random.default_rng(seed)
    values = np.array([statistic(rng.integers(0, n, n)) for _ in range(RESAMPLES)])
    return values[np.isfinite(values)]
