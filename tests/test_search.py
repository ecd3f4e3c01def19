"""Searching: the same trials every time, through kills too, and the fronts of other libraries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from elastune.errors import BadArtifact, BadRecipe, ElastuneError
from elastune.search import SearchResult, Trial, search
from elastune.space import ElasticDim, SearchSpace, SubnetConfig

VALUES = ("loss", "params")


def space_of(n_dims: int, n_choices: int = 3) -> SearchSpace:
    choices = tuple(range(8 * n_choices, 0, -8))
    return SearchSpace([ElasticDim(f"d{i}", "rank", choices, (f"m{i}",)) for i in range(n_dims)])


SPACE = space_of(6)


def measure(config: SubnetConfig) -> dict[str, float]:
    params = float(sum(config.values()))
    wave = sum(math.sin(i * choice) for i, choice in enumerate(config.values(), start=1))
    return {"loss": wave - params / 50, "params": params}


def run(storage: Path, trials: int = 20, *, space: SearchSpace = SPACE, **options: Any) -> Any:
    objective = options.pop("objective", measure)
    settings: Any = {"values": VALUES, "seed": 0} | options
    return search(space, objective, trials=trials, storage=storage, **settings)


def test_a_search_repeats_exactly_by_seed(tmp_path: Path) -> None:
    first, again = run(tmp_path / "a"), run(tmp_path / "b")
    assert first == again
    other = run(tmp_path / "c", seed=1)
    assert [t.config for t in first.trials[:3]] == [t.config for t in other.trials[:3]]
    assert [t.config for t in first.trials[3:]] != [t.config for t in other.trials[3:]]


def test_the_first_trials_are_those_that_need_no_search(tmp_path: Path) -> None:
    trials = run(tmp_path / "a", 5).trials
    named = [SPACE.heuristic(), SPACE.largest(), SPACE.smallest()]
    assert [trial.config for trial in trials[:3]] == named
    assert [trial.number for trial in trials] == [0, 1, 2, 3, 4]
    assert all(trial.values == measure(trial.config) for trial in trials)


@pytest.mark.parametrize("broken_at", [0, 1, 2, 7, 19])
def test_a_broken_search_goes_on_to_the_same_trials(broken_at: int, tmp_path: Path) -> None:
    calls: list[SubnetConfig] = []

    def breaks(config: SubnetConfig) -> dict[str, float]:
        if len(calls) == broken_at:
            raise KeyboardInterrupt
        calls.append(config)
        return measure(config)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", objective=breaks)
    measured: list[SubnetConfig] = []

    def counts(config: SubnetConfig) -> dict[str, float]:
        measured.append(config)
        return measure(config)

    resumed = run(tmp_path / "broken", objective=counts)
    assert resumed == run(tmp_path / "whole")
    assert len(measured) == 20 - broken_at
    assert run(tmp_path / "broken", objective=counts) == resumed
    assert len(measured) == 20 - broken_at


def test_more_trials_extend_a_finished_search(tmp_path: Path) -> None:
    run(tmp_path / "a", 6)
    assert run(tmp_path / "a", 15) == run(tmp_path / "b", 15)


def test_a_resumed_search_judges_values_in_the_same_order(tmp_path: Path) -> None:
    def swapped(config: SubnetConfig) -> dict[str, float]:
        return dict(reversed(measure(config).items()))

    fresh = run(tmp_path / "a", objective=swapped)
    assert fresh.best() == run(tmp_path / "a").best() == run(tmp_path / "b").best()
    assert list(fresh.trials[0].values) == list(VALUES)


@pytest.mark.parametrize(("n_dims", "n_choices"), [(1, 3), (2, 3), (2, 10), (4, 4), (1, 1)])
def test_a_small_space_is_tried_whole_without_repeats(
    n_dims: int, n_choices: int, tmp_path: Path
) -> None:
    space = space_of(n_dims, n_choices)
    result = run(tmp_path / "a", 10_000, space=space)
    assert len(result.trials) == space.size == n_choices**n_dims
    assert len({trial.config for trial in result.trials}) == space.size


def test_a_large_space_is_searched_without_repeats(tmp_path: Path) -> None:
    space = space_of(210)
    result = run(tmp_path / "a", 40, space=space)
    assert len({trial.config for trial in result.trials}) == 40


def test_progress_is_told_after_every_trial(tmp_path: Path) -> None:
    told: list[tuple[int, int, Trial]] = []
    result = run(tmp_path / "a", 4, progress=lambda *facts: told.append(facts))
    assert [(done, total) for done, total, _ in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [trial for *_, trial in told] == list(result.trials)


# --- results --------------------------------------------------------------------------------------


def result_of(points: np.ndarray) -> SearchResult:
    return SearchResult(
        tuple(
            Trial(i, SubnetConfig({"d0": i}), dict(zip("abc", map(float, row), strict=False)))
            for i, row in enumerate(points)
        )
    )


@pytest.mark.parametrize("n_values", [1, 2, 3])
@pytest.mark.parametrize("n_levels", [4, 1000])
def test_the_front_is_that_of_brute_force_and_of_pymoo(n_values: int, n_levels: int) -> None:
    rng = np.random.default_rng(n_values)
    points = rng.integers(n_levels, size=(120, n_values)).astype(float)
    front = result_of(points).pareto()
    kept = [tuple(trial.values.values()) for trial in front]
    brute = {tuple(p) for p in points if not any((q <= p).all() and (q < p).any() for q in points)}
    assert set(kept) == brute
    assert len(kept) == len(brute)  # of equals one stays
    ranks = NonDominatedSorting().do(points, only_non_dominated_front=True)
    assert {tuple(points[i]) for i in ranks} == brute
    first = {tuple(p): i for i, p in reversed(list(enumerate(points)))}
    assert [trial.number for trial in front] == sorted(first[point] for point in brute)


def test_the_best_is_of_lowest_first_value_then_cheapest_then_earliest() -> None:
    points = np.array([[2, 0], [1, 5], [1, 4], [1, 4], [3, 1]])
    assert result_of(points).best().number == 2


def test_a_search_that_tried_nothing_has_no_best(tmp_path: Path) -> None:
    result = run(tmp_path / "a", 0)
    assert result.trials == ()
    assert result.pareto() == []
    with pytest.raises(ElastuneError, match="tried nothing"):
        result.best()


# --- what is refused ------------------------------------------------------------------------------


def test_unknown_algorithms_are_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match=r"'randon' \(did you mean 'random'\?\); known are"):
        run(tmp_path / "a", algorithm="randon")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("values", [("loss",), ("error", "params"), ("params", "loss")])
def test_the_journal_of_other_objectives_is_refused(
    values: tuple[str, ...], tmp_path: Path
) -> None:
    run(tmp_path / "a", 4)

    def other(config: SubnetConfig) -> Mapping[str, float]:
        return dict.fromkeys(values, 0.0)

    with pytest.raises(BadArtifact, match="other objectives"):
        run(tmp_path / "a", 8, values=values, objective=other)


def test_the_journal_of_another_space_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "a", 4)
    with pytest.raises(BadArtifact, match=r"another search space.*\ntry: delete it"):
        run(tmp_path / "a", 8, space=space_of(5))


@pytest.mark.parametrize(
    "content", [b"garbage\nmore\n", b"{}\n", b"\x00\xff\x10\n\x80\n", b"[1]\n"]
)
def test_a_corrupt_journal_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    path.write_bytes(content)
    with pytest.raises(BadArtifact, match=r"study\.journal cannot be read.*\ntry: delete it"):
        run(path, 4)


def test_damage_in_the_middle_of_a_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    run(path, 6)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], lines[4][:20], b"\n", *lines[5:]]))
    with pytest.raises(BadArtifact, match="cannot be read"):
        run(path, 8)


@pytest.mark.parametrize("n_bytes", [1, 30])
def test_a_last_line_that_a_kill_cut_short_costs_that_trial_alone(
    n_bytes: int, tmp_path: Path
) -> None:
    path = tmp_path / "study.journal"
    run(path, 6)
    content = path.read_bytes()
    path.write_bytes(content[:-n_bytes])
    assert run(path, 9) == run(tmp_path / "whole", 9)
    assert run(path, 9) == run(tmp_path / "whole", 9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_configuration_that_measures_as_nothing_is_named(value: float, tmp_path: Path) -> None:
    def broken(config: SubnetConfig) -> dict[str, float]:
        return {"loss": value, "params": 1.0}

    with pytest.raises(ElastuneError, match=f"loss is {value}"):
        run(tmp_path / "a", 4, objective=broken)
