"""The additive model: against closed forms, against what made the trials, and how sure it is."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy import stats

from elastune.allocate import additive_loss, single_choice_losses
from elastune.search.base import Trial
from elastune.search.codes import codes_of
from elastune.search.surrogate import Additive, additivity
from elastune.space import ElasticDim, SearchSpace, SubnetConfig


def flat_space(n_dims: int, n_choices: int = 3) -> SearchSpace:
    choices = tuple(range(8 * n_choices, 0, -8))
    return SearchSpace([ElasticDim(f"d{i}", "rank", choices, (f"m{i}",)) for i in range(n_dims)])


def block_space(n_blocks: int) -> SearchSpace:
    dims = []
    for i in range(n_blocks):
        block = f"model.layers.{i}"
        dims.append(ElasticDim(f"layers.{i}.ffn", "ffn", (60, 40, 30), (f"{block}.mlp.down",)))
        dims.append(ElasticDim(f"layers.{i}.block", "depth", (1, 0), (block,)))
    return SearchSpace(dims)


def random_losses(space: SearchSpace, seed: int) -> dict[str, dict[int, float]]:
    rng = np.random.default_rng(seed)
    return {
        dim.name: dict(
            zip(
                dim.choices,
                [0.0, *rng.exponential(1.0, len(dim.choices) - 1).cumsum().tolist()],
                strict=True,
            )
        )
        for dim in space.dims
    }


def tried(
    space: SearchSpace, losses: dict[str, dict[int, float]], n: int, *, base: float = 2.0
) -> list[Trial]:
    """Return the largest and random configurations, whose losses add up."""
    rng = np.random.default_rng(5)
    configs = [space.largest(), *(space.sample(rng) for _ in range(n - 1))]
    return [
        Trial(i, config, {"loss": base + additive_loss(space, losses, config), "params": 1.0})
        for i, config in enumerate(configs)
    ]


@pytest.mark.parametrize("n", [12, 80])
def test_steps_are_those_of_ridge_regression(n: int) -> None:
    """Over trials and over steps: both solve (X'X + ridge) w = X'r."""
    space = flat_space(10)
    trials = tried(space, random_losses(space, 0), n)
    fit = Additive.fit(space, trials, bends=(math.inf,))
    index = {c: i for i, c in enumerate(space.dims[0].choices)}
    codes = np.array([[index[t.config[d.name]] for d in space.dims] for t in trials])
    # Steps of one dim beside each other.
    x = np.stack([codes[:, d] >= step for d in range(10) for step in (1, 2)], axis=1).astype(float)
    r = np.array([t.values["loss"] for t in trials]) - trials[0].values["loss"]
    prior = np.full(20, 0.5)
    slope = (x @ prior) @ r / ((x @ prior) @ (x @ prior))
    rest = r - slope * x @ prior
    scale = 1.2
    found = []
    for ridge in (0.3, 3.0, 30.0):
        w = np.linalg.solve(scale**2 * x.T @ x + ridge * np.eye(20), scale * x.T @ rest) * scale
        noise = rest @ (rest - x @ w) / n
        # The evidence by its definition: residuals are normal with this covariance.
        covariance = noise * (np.eye(n) + scale**2 / ridge * x @ x.T)
        evidence = stats.multivariate_normal(np.zeros(n), covariance).logpdf(rest)
        found.append((evidence, w + slope * prior, math.sqrt(noise)))
    _, steps, noise = max(found, key=lambda row: row[0])
    np.testing.assert_allclose(fit.steps, steps, atol=2e-4)
    assert fit.noise == pytest.approx(noise, rel=1e-2)


def test_what_adds_up_is_told_of_configurations_that_nobody_tried() -> None:
    space = block_space(6)
    losses = random_losses(space, 1)
    trials = tried(space, losses, 150)
    fit = Additive.fit(space, trials)
    rng = np.random.default_rng(9)
    new = [space.sample(rng) for _ in range(50)]
    expected = np.array([2.0 + additive_loss(space, losses, config) for config in new])
    np.testing.assert_allclose(fit.predict(new), expected, atol=0.1)
    assert fit.additivity.pearson > 0.995
    assert fit.additivity.n == 150
    refitted = fit.losses()
    for config, loss in zip(new, expected - 2.0, strict=True):
        assert additive_loss(space, refitted, config) == pytest.approx(loss, abs=0.1)


def test_choices_inside_a_block_that_is_left_out_change_nothing() -> None:
    space = block_space(3)
    fit = Additive.fit(space, tried(space, random_losses(space, 2), 20))
    gone = SubnetConfig({**space.largest(), "layers.1.block": 0})
    first, second = fit.predict([gone, SubnetConfig({**gone, "layers.1.ffn": 30})])
    assert first == second


def test_a_prior_in_any_unit_helps_few_trials() -> None:
    space = flat_space(40)
    losses = random_losses(space, 3)
    trials = tried(space, losses, 12)
    in_other_units = {
        name: {choice: 7 * loss for choice, loss in of_dim.items()}
        for name, of_dim in losses.items()
    }
    rng = np.random.default_rng(2)
    new = [space.sample(rng) for _ in range(50)]
    expected = [2.0 + additive_loss(space, losses, config) for config in new]
    alone = np.abs(Additive.fit(space, trials).predict(new) - expected).mean()
    helped = np.abs(Additive.fit(space, trials, in_other_units).predict(new) - expected).mean()
    assert helped < 0.02
    assert alone > 10 * helped


def test_a_prior_that_is_wrong_is_overruled_by_trials() -> None:
    space = flat_space(10)
    losses, wrong = random_losses(space, 3), random_losses(space, 4)
    wrong["d0"] = dict.fromkeys(wrong["d0"], 0.0)
    wrong["d1"] = {24: 0.0, 16: 1.0, 8: math.inf}
    trials = tried(space, losses, 200)
    fit = Additive.fit(space, trials, wrong)
    rng = np.random.default_rng(2)
    new = [space.sample(rng) for _ in range(50)]
    expected = np.array([2.0 + additive_loss(space, losses, config) for config in new])
    np.testing.assert_allclose(fit.predict(new), expected, atol=0.15)


def test_losses_that_compound_are_fitted_by_their_logarithm() -> None:
    """With plain sums the few far-off trials would decide what the others are."""
    space = flat_space(20)
    losses = random_losses(space, 6)
    most = sum(max(of_dim.values()) for of_dim in losses.values())

    def compound(config: SubnetConfig) -> float:
        return float(np.expm1(6 * additive_loss(space, losses, config) / most))

    rng = np.random.default_rng(7)
    codes = [rng.binomial(2, rng.random(), 20) for _ in range(110)]
    configs = [space.largest(), *(space.decode(list(map(int, code))) for code in codes)]
    trials = [Trial(i, c, {"loss": 2 + compound(c)}) for i, c in enumerate(configs)]
    bent = Additive.fit(space, trials[:80])
    plain = Additive.fit(space, trials[:80], bends=(math.inf,))
    measured = np.array([t.values["loss"] for t in trials[80:]])
    assert math.isfinite(bent.bend)
    by_rank = [stats.spearmanr(f.predict(configs[80:]), measured)[0] for f in (bent, plain)]
    assert by_rank[0] > 0.98
    assert by_rank[0] > by_rank[1] + 0.02


def test_failed_trials_are_left_out() -> None:
    space = flat_space(4)
    trials = tried(space, random_losses(space, 0), 20)
    broken = Trial(20, space.smallest(), {"loss": math.nan, "params": 1.0})
    again = Additive.fit(space, [*trials, broken])
    np.testing.assert_array_equal(again.steps, Additive.fit(space, trials).steps)


def test_drawn_steps_spread_as_the_fit_is_unsure() -> None:
    space = flat_space(10)
    trials = tried(space, random_losses(space, 8), 15)
    fit = Additive.fit(space, trials, bends=(math.inf,))
    features = codes_of(space).features(codes_of(space).of([space.smallest(), space.heuristic()]))
    rng = np.random.default_rng(0)
    sums = np.stack([features @ fit.draw(rng) for _ in range(2000)])
    np.testing.assert_allclose(sums.mean(axis=0), fit.sums(features), atol=0.1)
    np.testing.assert_allclose(sums.std(axis=0), fit.spread(features), rtol=0.1)


def test_each_trial_is_told_by_the_others() -> None:
    """Leave-one-out without refitting is leave-one-out with refitting, at the same ridge."""
    space = flat_space(6)
    trials = tried(space, random_losses(space, 2), 30)
    fit = Additive.fit(space, trials, bends=(math.inf,))
    ridge = fit._fit
    x, y = ridge.features.astype(float), ridge.target
    expected = []
    for i in range(len(y)):
        rest = np.arange(len(y)) != i
        gram = x[rest].T @ x[rest] + ridge.ridge * np.eye(x.shape[1])
        expected.append(y[i] - x[i] @ np.linalg.solve(gram, x[rest].T @ y[rest]))
    np.testing.assert_allclose(ridge.left_out(), expected, atol=1e-3)


def test_additivity_is_that_of_scipy_over_the_joint_trials() -> None:
    space = flat_space(8)
    losses = random_losses(space, 3)
    rng = np.random.default_rng(1)
    trials = [
        Trial(i, t.config, {"loss": 3 * t.values["loss"] + float(rng.normal(0, 2)), "params": 1.0})
        for i, t in enumerate(tried(space, losses, 40))
    ]
    single = SubnetConfig({**space.largest(), "d0": 8})
    more = [Trial(40, single, {"loss": 1e9}), Trial(41, space.smallest(), {"loss": math.nan})]
    more.append(Trial(42, space.smallest(), {"loss": 1e9}, dropped=True))
    found = additivity(space, losses, [*trials, *more])
    sums = [additive_loss(space, losses, t.config) for t in trials[1:]]
    measured = [t.values["loss"] for t in trials[1:]]
    assert found.n == 39
    assert found.pearson == pytest.approx(stats.pearsonr(sums, measured)[0])
    assert found.spearman == pytest.approx(stats.spearmanr(sums, measured)[0])
    assert found.slope == pytest.approx(stats.linregress(sums, measured)[0])
    assert math.isnan(additivity(space, losses, trials[:3]).pearson)


def test_single_choice_losses_of_what_adds_up_have_slope_one() -> None:
    space = block_space(4)
    made = random_losses(space, 5)
    losses = single_choice_losses(lambda c: 2 + additive_loss(space, made, c), space)
    found = additivity(space, losses, tried(space, made, 30))
    assert found[:3] == pytest.approx((1, 1, 1))


def test_a_fit_of_210_dims_and_1000_trials_is_a_matter_of_milliseconds() -> None:
    space = flat_space(210)
    rng = np.random.default_rng(0)
    configs = [space.sample(rng) for _ in range(1000)]
    trials = [Trial(i, c, {"loss": float(rng.random())}) for i, c in enumerate(configs)]
    Additive.fit(space, trials)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        Additive.fit(space, trials)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1
