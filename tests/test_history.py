"""A history that grows says what one made anew of the same trials says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from elastune.search import history as module
from elastune.search.base import Trial, non_dominated
from elastune.search.history import History
from elastune.space import SubnetConfig

_ASKED = ("finished", "values", "violations", "front")


def _trials(n: int, seed: int = 0) -> list[Trial]:
    """Return trials of two values, some failed, some dropped, some beyond a limit."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(n):
        loss, cost = rng.integers(0, 30, 2).tolist()
        loss = math.nan if rng.random() < 0.1 else float(loss)
        found.append(
            Trial(
                number,
                SubnetConfig({"a": number, "b": seed}),
                {"loss": loss, "cost": float(cost)},
                dropped=bool(rng.random() < 0.1),
                violation=float(rng.random() < 0.2),
            )
        )
    return found


@pytest.mark.parametrize("asked", [_ASKED, ("front",), ("values",), ()])
def test_a_grown_history_knows_what_a_new_one_finds(asked: tuple[str, ...]) -> None:
    trials = _trials(80)
    grown = History()
    for n in range(0, 81, 4):
        grown = grown.grown(trials[:n])
        for name in asked:
            getattr(grown, name)
    finished = [trial for trial in trials if math.isfinite(trial.values["loss"])]
    assert list(grown) == trials
    assert set(grown.tried) == {trial.config for trial in trials}
    assert len(grown.tried) == 80
    assert list(grown.finished) == finished
    np.testing.assert_array_equal(grown.values, [list(t.values.values()) for t in finished])
    np.testing.assert_array_equal(grown.violations, [t.violation for t in finished])
    assert list(grown.front) == non_dominated(trials)


def test_what_others_go_on_from_stays_as_it_is() -> None:
    trials, others = _trials(10), _trials(10, seed=1)
    first = History(trials[:5])
    longer = first.grown(trials)
    other = first.grown([*trials[:5], *others[5:]])
    assert trials[7].config not in first.tried
    assert len(first.tried) == len(set(first.tried)) == 5
    assert trials[7].config in longer.tried
    assert others[7].config not in longer.tried
    assert others[7].config in other.tried
    assert trials[7].config not in other.tried


def test_a_trial_that_was_running_and_now_has_values_is_seen() -> None:
    done = _trials(6)
    running = Trial(2, done[2].config, {"loss": math.nan, "cost": math.nan})
    before = History([*done[:2], running, *done[3:4]])
    assert before.front is before.front  # asked for, and remembered
    assert list(before.grown(done).front) == non_dominated(done)


def test_growing_looks_at_new_trials_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = _trials(300)
    history = History(trials[:200])
    for name in _ASKED:
        getattr(history, name)
    seen = 0

    def counted(some: list[Trial]) -> list[Trial]:
        nonlocal seen
        seen += len(some)
        return non_dominated(some)

    monkeypatch.setattr(module, "non_dominated", counted)
    for n in range(201, 301):
        history = history.grown(trials[:n])
    assert seen <= 100 * (1 + 30)  # the front has at most one trial for each of 30 costs
    assert list(history.front) == non_dominated(trials)
