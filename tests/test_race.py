"""The race's test: how often it drops a candidate as good as its rival, and how soon a bad one."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
from scipy.stats import t as student

from elastune.errors import BadRecipe
from elastune.race import ERROR_RATE, FEWEST, RUNGS, is_worse, rung_ends

RACES = 1500
_SHIFT = np.exp(0.5)  # mean of a lognormal of sigma 1

#: Differences of candidate and rival whose mean is zero. The tail of the third is on the
#: candidate's side: rare examples on which it is much better.
EQUALS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "lognormal": lambda rng, shape: rng.lognormal(0, 1, shape) - _SHIFT,
    "-lognormal": lambda rng, shape: _SHIFT - rng.lognormal(0, 1, shape),
    "heavy tails": lambda rng, shape: rng.standard_t(3, shape),
    "0/1, seldom": lambda rng, shape: rng.choice([-1.0, 0, 1], shape, p=[0.02, 0.96, 0.02]),
    "0/1, often": lambda rng, shape: rng.choice([-1.0, 0, 1], shape, p=[0.2, 0.6, 0.2]),
}


def drops(
    differences: np.ndarray, test: Callable[[np.ndarray, float], bool] = is_worse
) -> np.ndarray:
    """Race each row; return after how many examples it is dropped, 0 for never."""
    ends = rung_ends(differences.shape[1])
    part = ERROR_RATE / (len(ends) - 1)
    found = []
    for row in differences:
        found.append(next((end for end in ends[:-1] if test(row[:end], part)), 0))
    return np.array(found)


@pytest.mark.parametrize("n", [64, 256])
@pytest.mark.parametrize("name", EQUALS)
def test_candidates_as_good_as_their_rival_are_dropped_no_oftener_than_stated(
    name: str, n: int
) -> None:
    rate = float((drops(EQUALS[name](np.random.default_rng(0), (RACES, n))) > 0).mean())
    # 99 % of simulations at the stated rate lie below this.
    assert rate <= ERROR_RATE + 2.33 * np.sqrt(ERROR_RATE * (1 - ERROR_RATE) / RACES)


def test_the_plain_paired_test_would_break_the_stated_rate() -> None:
    quantile = lru_cache(student.isf)

    def plain(differences: np.ndarray, rate: float) -> bool:
        n = len(differences)
        statistic = differences.mean() / (differences.std(ddof=1) / np.sqrt(n))
        return bool(statistic > quantile(rate, n - 1))

    differences = EQUALS["-lognormal"](np.random.default_rng(0), (RACES, 64))
    assert (drops(differences, plain) > 0).mean() > 3 * ERROR_RATE


def test_clearly_worse_candidates_leave_at_the_first_rung() -> None:
    rng = np.random.default_rng(0)
    for n, worse_by, least in [(64, 2.0, 0.6), (64, 4.0, 0.99), (256, 1.0, 0.75), (256, 2.0, 0.99)]:
        found = drops(rng.standard_normal((300, n)) + worse_by)
        first = rung_ends(n)[0]
        assert (found == first).mean() >= least
    # Right answers of the rival where the candidate is wrong, and seldom the other way round.
    answers = rng.choice([-1.0, 0, 1], (300, 256), p=[0.02, 0.38, 0.6])
    assert (drops(answers) == 32).mean() > 0.95


def test_better_candidates_are_never_dropped() -> None:
    rng = np.random.default_rng(0)
    assert not drops(rng.standard_normal((300, 128)) - 0.5).any()


def test_too_few_broken_or_equal_pairs_prove_nothing() -> None:
    assert is_worse(np.full(FEWEST, 1.0), 0.01)
    assert not is_worse(np.full(FEWEST - 1, 1.0), 0.01)
    assert not is_worse(np.array([*np.full(FEWEST, 1.0), np.nan]), 0.01)
    assert not is_worse(np.array([*np.full(FEWEST, 1.0), np.inf]), 0.01)
    assert not is_worse(np.zeros(FEWEST), 0.01)
    assert not is_worse(np.full(FEWEST, -1.0), 0.01)


def test_differences_are_judged_whatever_their_unit() -> None:
    differences = np.random.default_rng(0).standard_normal(32) + 1.2
    answers = {
        rate: [is_worse(differences * unit, rate) for unit in (1e-8, 1, 1e8)]
        for rate in (0.5, 0.05, 1e-9)
    }
    assert {len(set(found)) for found in answers.values()} == {1}
    assert [found[0] for found in answers.values()] == [True, True, False]


def test_rungs_end_where_their_part_of_the_examples_is_full() -> None:
    assert rung_ends(512) == (64, 128, 256, 512)
    assert rung_ends(250) == (32, 63, 125, 250)
    assert rung_ends(64) == (16, 32, 64)  # 8 are too few
    assert rung_ends(20) == (20,)
    assert rung_ends(0) == (0,)
    assert rung_ends(100, (0.5, 1.0)) == (50, 100)
    assert rung_ends(1000) == tuple(int(1000 * part) for part in RUNGS)


@pytest.mark.parametrize("rungs", [(), (0.5,), (0.5, 0.25, 1.0), (0.0, 1.0), (0.5, 0.5, 1.0)])
def test_rungs_that_do_not_ascend_to_all_examples_are_refused(rungs: tuple[float, ...]) -> None:
    with pytest.raises(BadRecipe, match="ascend to 1"):
        rung_ends(100, rungs)
