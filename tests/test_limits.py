"""Limits as text: what they mean, how they are spelt, and what wrong ones are answered with."""

from __future__ import annotations

import math

import numpy as np
import pytest

from elastune.errors import BadRecipe
from elastune.search.base import SearchResult, Trial
from elastune.search.limits import (
    Limit,
    limits_of_quality,
    parse_limit,
    parse_limits,
    resolve,
    violation,
)
from elastune.space import SubnetConfig

DENSE = {"latency_ms": 200.0, "params": 1e6, "score": 0.90, "loss": 2.0, "memory_mb": 500.0}
REFERENCES = {"dense": DENSE, "heuristic": {"score": 0.85, "loss": 2.5, "latency_ms": 150.0}}


@pytest.mark.parametrize(
    ("text", "name", "low", "high"),
    [
        ("latency<=60%", "latency_ms", -math.inf, 120),
        ("latency <= 0.6x", "latency_ms", -math.inf, 120),
        ("latency≤0.1s", "latency_ms", -math.inf, 100),
        ("Latency_ms <= 12.5 ms", "latency_ms", -math.inf, 12.5),
        ("latency<=heuristic", "latency_ms", -math.inf, 150),
        ("params<=0.9B", "params", -math.inf, 900_000_000),
        ("params<=900m", "params", -math.inf, 900_000_000),
        ("parameters >= 1.5k", "params", 1500, math.inf),
        ("macs<=2e9", "macs", -math.inf, 2_000_000_000),
        ("memory<=1GiB", "memory_mb", -math.inf, 1024),
        ("memory<=104.8576MB", "memory_mb", -math.inf, 100),
        ("memory<=50%", "memory_mb", -math.inf, 250),
        ("size<=1.5MB", "size", -math.inf, 1_500_000),
        ("score>=dense-1.0", "score", 0.89, math.inf),
        ("accuracy>=dense - 1", "score", 0.89, math.inf),
        ("score>=heuristic", "score", 0.85, math.inf),
        ("score≥95%", "score", 0.855, math.inf),
        ("score>=-0.1", "score", -0.1, math.inf),
        ("loss<=dense+0.1", "loss", -math.inf, 2.1),
    ],
)
def test_a_text_means_a_range_of_a_value(text: str, name: str, low: float, high: float) -> None:
    found = resolve(text, REFERENCES)
    assert list(found) == [name]
    assert found[name] == (pytest.approx(low, rel=1e-12), pytest.approx(high, rel=1e-12))


def test_points_of_a_score_that_is_no_share_are_plain() -> None:
    references = {"dense": {"score": 12.0}}
    assert resolve("score<=dense+0.5", references, point=1.0) == {"score": (-math.inf, 12.5)}


def test_several_limits_all_hold_in_whatever_form_they_come() -> None:
    wanted = {"latency_ms": (-math.inf, 120.0), "score": (0.8, 0.95)}
    texts = ["latency<=80%, score>=0.8 and latency<=60%,score<=0.95"]
    assert resolve(texts[0], REFERENCES) == wanted
    lists = ["latency<=60%", "score>=0.8 and score<=0.95", "score>=0.5"]
    assert resolve(lists, REFERENCES) == wanted
    assert resolve(parse_limits(lists), REFERENCES) == wanted
    with pytest.raises(BadRecipe, match="contradict"):
        resolve("params<=1M and params>=2M")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("latncy<=60%", "did you mean 'latency'"),
        ("flops<=60%", "limits are on latency, "),
        ("latency<60%", "try: latency<=60%"),
        ("score>dense-1", "try: score>=dense-1"),
        ("params=5", "has <= or >="),
        ("params=<5", "try: params<=5"),
        ("params", "a limit is a name"),
        ("params<=1<=2", "a limit is a name"),
        ("params<=", "must be a number"),
        ("params<=5ms", "'ms' is no unit of params"),
        ("latency<=5GB", "allowed are us, ms, s, %, x"),
        ("memory<=5k", "MiB"),
        ("score>=dense-", "must be a number"),
        ("params<=dense-5", "only limits on score"),
        ("params<=-5", "negative"),
        ("latency<=-60%", "negative"),
        ("params<=1e999", "too large"),
        ("params<=nan", "must be a number"),
        ("params<=inf", "must be a number"),
        ("params<=1,000", "a limit is a name"),
        ("", "no limit"),
        ("latency<=٣", "must be a number"),
    ],
)
def test_what_is_wrong_is_said(text: str, says: str) -> None:
    with pytest.raises(BadRecipe, match=says):
        parse_limits(text)


def test_unknown_references_are_answered_with_those_that_are_known() -> None:
    with pytest.raises(BadRecipe, match=r"did you mean 'heuristic'.*known are dense, heuristic"):
        resolve("score>=heuristik-1", REFERENCES)
    with pytest.raises(BadRecipe, match=r"dense has no macs.*it has latency_ms, params"):
        resolve("macs<=60%", REFERENCES)
    with pytest.raises(BadRecipe, match=r"no systems\ntry: a number without %"):
        resolve("macs<=60%")


def test_the_canonical_spelling_is_read_as_the_same_limit() -> None:
    rng = np.random.default_rng(0)
    names = ("latency_ms", "memory_mb", "size", "params", "score", "loss")
    for _ in range(500):
        number = float(10.0 ** rng.uniform(-8, 15) * rng.choice([1.0, rng.random()]))
        name, sign = rng.choice(names), rng.choice(["<=", ">="])
        limits = [Limit(name, sign, number), Limit(name, sign, number, "dense", part=True)]
        if name in ("score", "loss"):
            limits += [
                Limit(name, sign, -number, "two-words_3"),
                Limit(name, sign, 0.0, "smallest"),
            ]
        for limit in limits:
            assert parse_limit(str(limit)) == limit
    assert str(parse_limit("params ≤ 0.9B")) == "params<=900000000"
    assert str(parse_limit("latency<=60%")) == "latency<=0.6x"


def test_random_texts_raise_nothing_but_bad_recipe() -> None:
    rng = np.random.default_rng(1)
    words = ["latency", "score", "params", "memory", "<=", ">=", "≤", "<", "=", "60", "%", "x", "-"]
    words += ["dense", "1.0", "1e5", "e", ".", " ", ",", " and ", "GB", "ms", "k", "+", "\n", "٣"]
    n_read = 0
    for _ in range(5000):
        if rng.random() < 0.2:
            text = "".join(chr(c) for c in rng.integers(1, 0x2FF, rng.integers(0, 12)))
        else:
            text = "".join(rng.choice(words, rng.integers(1, 5)))
            if rng.random() < 0.5:
                text = f"{rng.choice(words[:4])}{rng.choice(words[4:7])}{text}"
        try:
            limits = parse_limits(text)
            resolve(limits, REFERENCES)
        except BadRecipe:
            continue
        n_read += 1
        assert parse_limits([str(limit) for limit in limits]) == limits
    assert n_read > 20


def test_a_score_is_limited_by_its_error_and_a_perplexity_by_itself() -> None:
    limits = {"score": (0.8, math.inf), "params": (0.0, 5.0)}
    as_error = limits_of_quality(limits, "error", higher_is_better=True)
    assert as_error == {"params": (0.0, 5.0), "error": (-math.inf, pytest.approx(0.2))}
    perplexity = {"score": (-math.inf, 12.0), "error": (-math.inf, 11.0)}
    as_error = limits_of_quality(perplexity, "error", higher_is_better=False)
    assert as_error == {"error": (-math.inf, 11.0)}


def test_violations_are_parts_of_the_bounds_added_up() -> None:
    limits = {"params": (2.0, 4.0), "loss": (-math.inf, 1.0), "macs": (-math.inf, 3.0)}
    assert violation({"params": 3.0, "loss": 1.0}, limits) == 0
    assert violation({"params": 5.0, "loss": 1.5, "macs": 2.0}, limits) == pytest.approx(0.75)
    assert violation({"params": 1.0, "loss": 0.0}, limits) == pytest.approx(0.5)
    assert violation({"params": math.nan}, limits) == math.inf


def test_the_best_trial_can_be_asked_for_by_text() -> None:
    table = [(1.0, 2e6, 0.0), (2.0, 1e6, 0.0), (3.0, 5e5, 0.0)]
    trials = [
        Trial(i, SubnetConfig({"d": i}), {"loss": loss, "params": params})
        for i, (loss, params, _) in enumerate(table)
    ]
    result = SearchResult(tuple(trials))
    assert result.best("params<=1.5M").number == 1
    assert result.best(["params<=1.5M", "params<=0.6M"]).number == 2
    assert result.best("params<=50%", references={"dense": {"params": 2e6}}).number == 1
    assert result.best({"params": 1.5e6}).number == 1
    assert result.best({"params": (0.0, 6e5)}).number == 2
    assert result.best("params<=1.5M and loss>=2.5").number == 2
    with pytest.raises(BadRecipe, match=r"none of the 3 trials has params <= 100000; the smallest"):
        result.best("params<=0.1M")
    with pytest.raises(BadRecipe, match="has params >= 3000000; the largest found: params 2000000"):
        result.best("params>=3M")
    with pytest.raises(BadRecipe, match="no limit can be set on 'macs'"):
        result.best("macs<=3M")
