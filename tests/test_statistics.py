"""Standard errors and paired comparisons against scipy, formulas and simulated truth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

from elastune import statistics
from elastune.errors import BadData
from elastune.metrics import (
    ACCURACY,
    EXACT_MATCH,
    F1,
    MATTHEWS,
    METRICS,
    PEARSON,
    PERPLEXITY,
    SPEARMAN,
    TOKEN_F1,
    Metric,
    Record,
    mean,
)
from elastune.statistics import compare, stderr


def records(**columns: Sequence[float]) -> list[Record]:
    """One record per place of the columns."""
    rows = zip(*(np.asarray(column).tolist() for column in columns.values()), strict=True)
    return [
        {"index": i, **dict(zip(columns, row, strict=True))}
        for i, row in enumerate(map(tuple, rows))
    ]


def classes(n: int, right: float, seed: int) -> list[Record]:
    gold = np.random.default_rng(99).integers(0, 2, n)
    told = np.where(np.random.default_rng(seed).random(n) < right, gold, 1 - gold)
    return records(prediction=told, gold=gold)


def numbers(n: int, noise: float, seed: int, scale: float = 1.0) -> list[Record]:
    gold = np.round(np.random.default_rng(99).random(n) * 25) / 5
    told = scale * (gold + noise * np.random.default_rng(seed).standard_normal(n))
    return records(prediction=told, gold=gold)


# -- standard errors -----------------------------------------------------------------------------


def test_a_mean_has_the_standard_error_of_the_textbook() -> None:
    values = np.random.default_rng(0).random(50)
    assert stderr(TOKEN_F1, records(f1=values)) == pytest.approx(stats.sem(values))


def test_the_bootstrap_of_a_mean_agrees_with_its_formula() -> None:
    values = np.random.default_rng(0).random(400)
    drawn = Metric("mean", "fraction", True, ("f1",), mean)
    assert stderr(drawn, records(f1=values)) == pytest.approx(stats.sem(values), rel=0.08)


@pytest.mark.parametrize("metric", [MATTHEWS, F1, PEARSON, SPEARMAN])
def test_the_bootstrap_agrees_with_scipys(metric: Metric) -> None:
    rows = classes(300, 0.8, 1) if metric in (MATTHEWS, F1) else numbers(300, 1.0, 1)
    told, gold = metric.arrays(rows)
    sources = {
        "matthews": matthews_corrcoef,
        "f1": f1_score,
        "pearson": lambda a, b: stats.pearsonr(a, b).statistic,
        "spearman": lambda a, b: stats.spearmanr(a, b).statistic,
    }
    theirs = stats.bootstrap(
        (told, gold),
        lambda a, b: sources[metric.name](b, a),
        paired=True,
        vectorized=False,
        n_resamples=500,
        method="percentile",
        rng=np.random.default_rng(5),
    )
    assert stderr(metric, rows) == pytest.approx(theirs.standard_error, rel=0.15)


def test_the_bootstrap_covers_the_truth_as_often_as_it_should(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    rng, truth, covered = np.random.default_rng(0), 0.6, 0
    for _ in range(100):
        a, b = rng.multivariate_normal([0, 0], [[1, truth], [truth, 1]], 80).T
        error = stderr(PEARSON, records(prediction=a, gold=b))
        covered += abs(stats.pearsonr(a, b).statistic - truth) < 1.96 * error
    assert 86 <= covered <= 100


def test_too_little_to_tell_gives_nan() -> None:
    assert math.isnan(stderr(ACCURACY, []))
    assert math.isnan(stderr(MATTHEWS, classes(1, 1.0, 0)))
    assert math.isnan(stderr(PEARSON, records(prediction=[1.0, 1.0, 1.0], gold=[1.0, 2.0, 3.0])))
    assert math.isnan(stderr(PERPLEXITY, records(nll=[3.0], tokens=[2])))


def test_resamples_without_a_value_are_left_out() -> None:
    # One of four differs: a third of the resamples lack it, and are constant.
    rows = records(prediction=[0.0, 0.1, 0.0, 1.0], gold=[0.0, 0.0, 0.0, 1.0])
    assert 0 < stderr(PEARSON, rows) < 1


def test_the_seed_decides_the_bootstrap() -> None:
    rows = numbers(60, 1.0, 1)
    assert stderr(SPEARMAN, rows, seed=3) == stderr(SPEARMAN, rows, seed=3)
    assert stderr(SPEARMAN, rows, seed=3) != stderr(SPEARMAN, rows, seed=4)


# -- comparisons ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wins", "losses", "ties"), [(12, 3, 85), (5, 5, 10), (0, 1, 4), (9, 0, 1)]
)
def test_right_and_wrong_answers_are_compared_by_the_exact_sign_test(
    wins: int, losses: int, ties: int
) -> None:
    ours = [True] * wins + [False] * losses + [True] * ties
    theirs = [False] * wins + [True] * losses + [True] * ties
    found = compare(ACCURACY, records(correct=ours), records(correct=theirs))
    assert found.p == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)
    assert found.difference == pytest.approx((wins - losses) / len(ours))
    assert found.low <= found.difference <= found.high
    assert found.n == len(ours)


def test_equal_answers_are_within_noise_but_no_certainty() -> None:
    rows = records(exact=[True, False, True, True])
    found = compare(EXACT_MATCH, rows, rows)
    assert (found.difference, found.p, found.verdict) == (0, 1, "within noise")
    assert found.low < -0.2
    assert found.high > 0.2


def test_the_interval_of_paired_proportions_covers_the_truth() -> None:
    rng, covered, runs = np.random.default_rng(1), 0, 400
    for _ in range(runs):
        luck = rng.random(60)
        ours, theirs = luck < 0.7, np.where(rng.random(60) < 0.2, rng.random(60) < 0.5, luck < 0.6)
        found = compare(ACCURACY, records(correct=ours), records(correct=theirs))
        covered += found.low <= 0.7 - (0.2 * 0.5 + 0.8 * 0.6) <= found.high
    assert 0.92 <= covered / runs <= 0.99


def test_means_are_compared_as_by_the_paired_t_test() -> None:
    rng = np.random.default_rng(3)
    ours = rng.random(120)
    theirs = ours - 0.03 + 0.15 * rng.standard_normal(120)
    found = compare(TOKEN_F1, records(f1=ours), records(f1=theirs))
    test = stats.ttest_rel(ours, theirs)
    interval = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(test.pvalue, abs=0.02)


def test_sign_flips_agree_with_scipys_permutation_test() -> None:
    ours, theirs = np.random.default_rng(4).random((2, 10))
    ours += 0.25
    exact = stats.permutation_test(
        (ours, theirs), lambda a, b: np.mean(a) - np.mean(b), permutation_type="samples"
    )
    found = compare(TOKEN_F1, records(f1=ours), records(f1=theirs))
    assert found.p == pytest.approx(exact.pvalue, abs=0.03)


@pytest.mark.parametrize("metric", [MATTHEWS, F1, PERPLEXITY])
def test_randomisation_agrees_with_scipys_permutation_test(metric: Metric) -> None:
    if metric is PERPLEXITY:
        rng = np.random.default_rng(0)
        losses = 30 + 3 * rng.standard_normal(40)
        counts = rng.integers(10, 20, 40)
        ours = records(nll=losses, tokens=counts)
        theirs = records(nll=losses + 1 + 3 * rng.standard_normal(40), tokens=counts)
    else:
        ours, theirs = classes(60, 0.85, 1), classes(60, 0.7, 2)
    left, right = metric.arrays(ours), metric.arrays(theirs)
    same = left[1]
    exact = stats.permutation_test(
        (left[0], right[0]),
        lambda a, b: metric.value(a, same) - metric.value(b, same),
        permutation_type="samples",
        n_resamples=2000,
        rng=np.random.default_rng(9),
    )
    found = compare(metric, ours, theirs)
    assert found.p == pytest.approx(exact.pvalue, abs=0.03)
    assert found.difference == pytest.approx(metric.value(*left) - metric.value(*right))


@pytest.mark.parametrize("metric", [PEARSON, SPEARMAN])
def test_a_correlation_does_not_see_the_scale_of_the_predictions(metric: Metric) -> None:
    ours = numbers(150, 0.8, 1)
    plain, scaled = numbers(150, 1.6, 2), numbers(150, 1.6, 2, scale=0.01)
    one, other = compare(metric, ours, plain), compare(metric, ours, scaled)
    assert one.p == pytest.approx(other.p, abs=2 / statistics.PERMUTATIONS)
    assert (one.low, one.high) == pytest.approx((other.low, other.high))
    assert one.verdict == "better"


@pytest.mark.parametrize("metric", [PEARSON, SPEARMAN])
def test_prepared_columns_give_the_metrics_own_value(metric: Metric) -> None:
    left = metric.arrays(numbers(70, 1.0, 1))
    right = metric.arrays(numbers(70, 1.0, 2))
    value, ours, theirs = statistics._prepared(metric, left, right)
    drawn = np.random.default_rng(0).integers(0, 70, 70)
    for before, after in ((left, ours), (right, theirs)):
        expected = metric.value(*(column[drawn] for column in before))
        assert value(*(column[drawn] for column in after)) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [ACCURACY, TOKEN_F1, MATTHEWS])
def test_no_difference_is_found_as_seldom_as_it_should_be(
    metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "PERMUTATIONS", 200)
    monkeypatch.setattr(statistics, "RESAMPLES", 20)
    false_alarms = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        if metric is MATTHEWS:
            ours, theirs = classes(60, 0.8, 2 * seed), classes(60, 0.8, 2 * seed + 1)
        elif metric is ACCURACY:
            ours, theirs = (records(correct=rng.random(60) < 0.7) for _ in range(2))
        else:
            ours, theirs = (records(f1=rng.random(60) ** 2) for _ in range(2))
        false_alarms += compare(metric, ours, theirs).verdict != "within noise"
    # Binomial(100, 0.05): more than 12 in one of a thousand runs.
    assert false_alarms <= 12


def test_lower_perplexity_is_the_better_one() -> None:
    counts = [100] * 30
    noise = np.random.default_rng(0).standard_normal(30)
    worse, better = (
        records(nll=300 + shift + noise * (1 + shift), tokens=counts) for shift in (5, 0)
    )
    found = compare(PERPLEXITY, better, worse)
    assert found.difference < 0
    assert found.high < 0
    assert found.verdict == "better"
    assert compare(PERPLEXITY, worse, better).verdict == "worse"


def test_systems_exchanged_give_the_difference_with_the_other_sign() -> None:
    ours, theirs = numbers(80, 0.5, 1), numbers(80, 1.5, 2)
    one, other = compare(SPEARMAN, ours, theirs), compare(SPEARMAN, theirs, ours)
    assert one.difference == -other.difference
    assert one.p == other.p
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert (one.verdict, other.verdict) == ("better", "worse")


def test_p_is_never_zero() -> None:
    yes, no = records(correct=[True] * 3000), records(correct=[False] * 3000)
    assert compare(ACCURACY, yes, no).p > 0
    ours, theirs = records(f1=np.full(500, 0.9)), records(f1=np.full(500, 0.1))
    assert compare(TOKEN_F1, ours, theirs).p == 1 / (statistics.PERMUTATIONS + 1)
    assert compare(TOKEN_F1, ours, theirs).verdict == "better"


def test_pairs_are_found_by_index_and_not_by_place() -> None:
    ours = records(correct=[True, True, False, True])
    theirs = records(correct=[False, True, False, False])[::-1]
    found = compare(ACCURACY, ours, theirs[:3])  # index 0 is not among them
    assert (found.n, found.difference) == (3, pytest.approx(1 / 3))
    assert found.p == 1


def test_an_undefined_metric_gives_no_verdict() -> None:
    constant = records(prediction=[2.0, 2.0, 2.0], gold=[1.0, 2.0, 3.0])
    found = compare(PEARSON, constant, records(prediction=[1.0, 2.0, 3.0], gold=[1.0, 2.0, 3.0]))
    assert found.verdict == "unknown"


def test_what_cannot_be_paired_is_refused() -> None:
    ours = classes(5, 1.0, 0)
    with pytest.raises(BadData, match="no example in common"):
        compare(MATTHEWS, ours, [row | {"index": row["index"] + 9} for row in ours])
    other = [row | ({"gold": 7} if row["index"] == 2 else {}) for row in ours]
    with pytest.raises(BadData, match="example 2 has gold"):
        compare(MATTHEWS, ours, other)
    with pytest.raises(BadData, match="6 records have 5 indices"):
        compare(MATTHEWS, [*ours, ours[0]], ours)


def test_every_metric_can_be_compared() -> None:
    rng = np.random.default_rng(0)
    sides = []
    for _ in range(2):
        columns = {name: rng.integers(0, 2, 40) for name in ("correct", "correct_norm", "exact")}
        columns |= {"f1": rng.random(40), "prediction": rng.integers(0, 2, 40)}
        columns |= {"gold": np.arange(40) % 2, "nll": 5 * rng.random(40), "tokens": [9] * 40}
        sides.append(records(**columns))
    for metric in METRICS.values():
        found = compare(metric, *sides)
        assert found.low <= found.high
        assert 0 < found.p <= 1
        assert found.metric == metric.name
