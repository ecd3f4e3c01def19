"""Metrics equal scikit-learn's and scipy's, ties, constants and single classes included."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from elastune.metrics import METRICS, Metric

sklearn = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")


def value(name: str, prediction, gold) -> float:
    return METRICS[name].value(np.array(prediction, float), np.array(gold, float))


def same(ours: float, theirs: float) -> bool:
    return math.isclose(ours, theirs, abs_tol=1e-12) or (math.isnan(ours) and math.isnan(theirs))


@pytest.mark.parametrize("balance", [0.0, 0.02, 0.5, 0.9, 1.0])
def test_classes_are_judged_as_by_sklearn(balance):
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 20, 1000):
        for share in (0.0, balance, 0.5, 1.0):
            gold, prediction = rng.random(n) < balance, rng.random(n) < share
            gold, prediction = gold.astype(int), prediction.astype(int)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # scikit-learn warns of a single class
                matthews = sklearn.matthews_corrcoef(gold, prediction)
                f1 = sklearn.f1_score(gold, prediction, zero_division=0)
                accuracy = sklearn.accuracy_score(gold, prediction)
            assert same(value("matthews", prediction, gold), matthews)
            assert same(value("f1", prediction, gold), f1)
            assert same(METRICS["accuracy"].value((gold == prediction).astype(float)), accuracy)


@pytest.mark.parametrize("levels", [2, 6, 26, 10**6])
def test_correlations_equal_scipys_with_and_without_ties(levels):
    rng = np.random.default_rng(1)
    for n in (2, 3, 10, 1500):
        gold = rng.integers(levels, size=n) / 5
        for prediction in (
            rng.normal(size=n),
            gold + rng.normal(size=n),
            -gold,
            gold**3,
            np.round(gold + rng.normal(size=n)),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # scipy warns of constants
                pearson = stats.pearsonr(prediction, gold).statistic
                spearman = stats.spearmanr(prediction, gold).statistic
            assert value("pearson", prediction, gold) == pytest.approx(
                pearson, abs=1e-9, nan_ok=True
            )
            assert value("spearman", prediction, gold) == pytest.approx(
                spearman, abs=1e-9, nan_ok=True
            )


def test_constant_predictions_give_what_the_definitions_give():
    gold = [0, 1, 1, 0]
    assert value("matthews", [1, 1, 1, 1], gold) == 0
    assert value("f1", [0, 0, 0, 0], gold) == 0
    assert value("f1", [0, 0], [0, 0]) == 0
    assert math.isnan(value("pearson", [2.5] * 4, gold))
    assert math.isnan(value("spearman", [2.5] * 4, gold))


def test_matthews_equals_its_counts_formula():
    rng = np.random.default_rng(2)
    for _ in range(50):
        gold, prediction = rng.integers(2, size=40), rng.integers(2, size=40)
        tp, tn = (gold & prediction).sum(), ((1 - gold) & (1 - prediction)).sum()
        fp, fn = ((1 - gold) & prediction).sum(), (gold & (1 - prediction)).sum()
        below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        expected = (tp * tn - fp * fn) / below if below else 0.0
        assert value("matthews", prediction, gold) == pytest.approx(expected, abs=1e-12)


def test_matthews_of_a_large_skewed_set_keeps_its_digits():
    gold = np.zeros(400_000)
    gold[:3] = 1
    prediction = np.zeros(400_000)
    prediction[1:5] = 1
    expected = sklearn.matthews_corrcoef(gold, prediction)
    assert value("matthews", prediction, gold) == pytest.approx(expected, abs=1e-9)


def test_perplexity_weighs_tokens_not_texts():
    nll, tokens = np.array([2.0, 30.0]), np.array([1.0, 10.0])
    assert METRICS["perplexity"].value(nll, tokens) == pytest.approx(math.exp(32 / 11))
    assert METRICS["perplexity"].value(np.array([1e6]), np.array([1.0])) == math.inf


def test_columns_are_read_from_records_in_their_order():
    records = [{"prediction": 1, "gold": 0, "text": "a"}, {"prediction": 0, "gold": 1}]
    prediction, gold = METRICS["f1"].arrays(records)
    assert prediction.tolist() == [1, 0]
    assert gold.tolist() == [0, 1]
    (correct,) = METRICS["accuracy"].arrays([{"correct": True}, {"correct": False}])
    assert correct.tolist() == [1, 0]


def test_names_are_unique_and_ranges_are_said():
    assert all(METRICS[name].name == name for name in METRICS)
    assert all(isinstance(metric, Metric) for metric in METRICS.values())
    assert {m.unit for m in METRICS.values()} == {"fraction", "correlation", "perplexity"}
    assert [m.name for m in METRICS.values() if not m.higher_is_better] == ["perplexity"]
