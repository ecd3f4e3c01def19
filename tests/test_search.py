"""Searching: the same trials every time, through kills too, and the fronts of other libraries."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
from tiny_llama import tiny_llama, tiny_tokenizer
from tiny_models import fill_adapters

from elastune.build_space import lora_space
from elastune.build_structure import structure_space
from elastune.cost import Cost, CostModel
from elastune.errors import BadArtifact, BadRecipe, ElastuneError, InvalidSubnet
from elastune.evaluate import mean_loss
from elastune.objective import make_objective
from elastune.report.trials import COSTS
from elastune.search import ALGORITHMS, SearchResult, Trial, search
from elastune.search.store import TrialStore
from elastune.sections import SearchConfig
from elastune.space import ElasticDim, SearchSpace, SubnetConfig
from elastune.supernet import SuperNetwork
from elastune.tasks.base import Example
from elastune.tasks.custom import Custom

VALUES = ("loss", "params")
#: All but the one that ends by itself after three.
GOING_ON = [name for name in ALGORITHMS if name != "heuristic"]


def space_of(n_dims: int, n_choices: int = 3) -> SearchSpace:
    choices = tuple(range(8 * n_choices, 0, -8))
    return SearchSpace([ElasticDim(f"d{i}", "rank", choices, (f"m{i}",)) for i in range(n_dims)])


SPACE = space_of(6)


def measure(config: SubnetConfig) -> dict[str, float]:
    params = float(sum(config.values()))
    wave = sum(math.sin(i * choice) for i, choice in enumerate(config.values(), start=1))
    return {"loss": wave - params / 50, "params": params}


STARTS = [SPACE.decode(code) for code in ([0, 1] * 3, [1, 1, 0, 0, 2, 2], [2, 0] * 3, [1, 0] * 3)]


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


@pytest.mark.parametrize("algorithm", GOING_ON)
def test_starts_are_tried_first_once_and_in_their_order(algorithm: str, tmp_path: Path) -> None:
    options: Any = {"algorithm": algorithm}
    given = [STARTS[0], SPACE.smallest(), STARTS[1], STARTS[0]]
    tried = [trial.config for trial in run(tmp_path / "a", start=given, **options).trials]
    assert tried[:3] == given[:3]
    if algorithm != "exhaustive":
        assert tried[3:5] == [SPACE.heuristic(), SPACE.largest()]
    assert len(set(tried)) == 20
    few = [trial.config for trial in run(tmp_path / "b", 2, start=given, **options).trials]
    assert few == given[:2]
    more = [trial.config for trial in run(tmp_path / "b", start=given, **options).trials]
    assert more == tried


def test_starts_that_come_later_are_tried_next(tmp_path: Path) -> None:
    before = run(tmp_path / "a", 6)
    after = run(tmp_path / "a", 10, start=STARTS)
    assert after.trials[:6] == before.trials
    assert [trial.config for trial in after.trials[6:]] == STARTS


@pytest.mark.parametrize("broken_at", [0, 1, 2, 7, 19])
@pytest.mark.parametrize("n_starts", [0, 4])
@pytest.mark.parametrize("algorithm", GOING_ON)
def test_a_broken_search_goes_on_to_the_same_trials(
    algorithm: str, n_starts: int, broken_at: int, tmp_path: Path
) -> None:
    options = {"algorithm": algorithm, "start": STARTS[:n_starts]}
    calls: list[SubnetConfig] = []

    def breaks(config: SubnetConfig) -> dict[str, float]:
        if len(calls) == broken_at:
            raise KeyboardInterrupt
        calls.append(config)
        return measure(config)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", objective=breaks, **options)
    measured: list[SubnetConfig] = []

    def counts(config: SubnetConfig) -> dict[str, float]:
        measured.append(config)
        return measure(config)

    resumed = run(tmp_path / "broken", objective=counts, **options)
    assert resumed == run(tmp_path / "whole", **options)
    assert len(measured) == 20 - broken_at
    assert run(tmp_path / "broken", objective=counts, **options) == resumed
    assert len(measured) == 20 - broken_at


@pytest.mark.parametrize("broken_at", [0, 1, 2, 4])
def test_a_broken_search_of_the_heuristic_ends_as_a_whole_one(
    broken_at: int, tmp_path: Path
) -> None:
    options: Any = {"algorithm": "heuristic", "start": STARTS[:2]}
    calls: list[SubnetConfig] = []

    def breaks(config: SubnetConfig) -> dict[str, float]:
        if len(calls) == broken_at:
            raise KeyboardInterrupt
        calls.append(config)
        return measure(config)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", objective=breaks, **options)
    resumed = run(tmp_path / "broken", **options)
    assert resumed == run(tmp_path / "whole", **options)
    named = [SPACE.heuristic(), SPACE.largest(), SPACE.smallest()]
    assert [trial.config for trial in resumed.trials] == [*STARTS[:2], *named]


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


@pytest.mark.parametrize("names", [("b",), ("b", "c"), ("a", "b"), ("c",)])
def test_the_best_under_limits_is_that_of_brute_force(names: tuple[str, ...]) -> None:
    rng = np.random.default_rng(len(names))
    points = rng.integers(12, size=(80, 3)).astype(float)
    points[::9, 0] = math.nan
    result = result_of(points)
    for levels in rng.integers(1, 13, size=(30, len(names))).tolist():
        limits = dict(zip(names, levels, strict=True))
        columns = ["abc".index(name) for name in names]
        fits = [i for i, p in enumerate(points) if all(p[columns] <= levels) and p[0] == p[0]]
        if fits:
            assert result.best(limits).number == min(fits, key=lambda i: (*points[i], i))
        else:
            with pytest.raises(BadRecipe, match="none of the 71 trials"):
                result.best(limits)


def test_limits_on_what_trials_do_not_hold_are_counted() -> None:
    result = result_of(np.array([[1, 50], [2, 40], [3, 30]]))

    def costs(config: SubnetConfig) -> dict[str, float]:
        return {"a": -1.0, "macs": 10.0 * config["d0"], "memory": -config["d0"]}

    assert result.best({"memory": -1}, costs=costs).number == 1
    assert result.best({"memory": -1, "b": 35}, costs=costs).number == 2
    assert result.best({"macs": 0}, costs=costs).number == 0
    assert result.best({"a": 1}, costs=costs).number == 0  # what was measured counts
    with pytest.raises(
        BadRecipe, match=r"limit .* 'mac' \(did you mean 'macs'\?\); .* a, macs, me"
    ):
        result.best({"mac": 1}, costs=costs)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"b": 29.5}, r"3 trials has b <= 29\.5; the smallest found: b 30\ntry: larger limits"),
        ({"a": 1, "b": 30}, r"has a <= 1 and b <= 30; the smallest found: a 1, b 30"),
        ({"c": 1}, r"no limit can be set on 'c'; trials have a, b"),
        ({"b": math.nan}, "the limit on b must be a number, got nan"),
    ],
)
def test_limits_that_no_trial_keeps_are_answered_with_the_smallest_found(
    limits: dict[str, float], message: str
) -> None:
    with pytest.raises(BadRecipe, match=message):
        result_of(np.array([[1, 50], [2, 40], [3, 30]])).best(limits)


# --- trials that fail -----------------------------------------------------------------------------


def half_broken(config: SubnetConfig) -> dict[str, float]:
    measured = measure(config)
    wrong = {0: math.nan, 1: math.inf, 2: -math.inf}.get(int(measured["params"]) // 8 % 6)
    return measured if wrong is None else measured | {"loss": wrong}


def test_failed_trials_are_kept_but_rank_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "elastune"):
        result = run(tmp_path / "a", 40, objective=half_broken)
    failed = [trial for trial in result.trials if not math.isfinite(trial.values["loss"])]
    kinds = {str(trial.values["loss"]) for trial in failed}
    assert kinds == {"nan", "inf", "-inf"}
    assert [trial.failed for trial in result.trials] == [trial in failed for trial in result.trials]
    valid = [trial for trial in result.trials if not trial.failed]
    assert result.best() == min(valid, key=lambda trial: trial.values["loss"])
    assert result.pareto() == SearchResult(tuple(valid)).pareto() != []
    assert len(caplog.messages) == len(failed)
    first = failed[0]
    loss = first.values["loss"]
    start = f"trial {first.number} failed: loss {loss}, params {first.values['params']} for "
    assert caplog.messages[0] == start + first.config.short()


@pytest.mark.parametrize("algorithm", GOING_ON)
def test_failed_trials_are_read_back_from_the_journal(algorithm: str, tmp_path: Path) -> None:
    options: Any = {"algorithm": algorithm, "objective": half_broken}
    whole = run(tmp_path / "whole", 30, **options)
    run(tmp_path / "a", 11, **options)
    resumed = run(tmp_path / "a", 30, **options)
    assert repr(resumed) == repr(whole)  # a NaN equals none
    assert "NaN" not in (tmp_path / "a").read_text()
    assert "Infinity" not in (tmp_path / "a").read_text()


def test_results_with_failed_trials_are_plain_json(tmp_path: Path) -> None:
    result = run(tmp_path / "a", 40, objective=half_broken)
    text = json.dumps(result.to_dict(), allow_nan=False)
    again = SearchResult.from_dict(json.loads(text))
    assert [trial.failed for trial in again.trials] == [trial.failed for trial in result.trials]
    assert again.pareto() == result.pareto()
    assert again.best() == result.best()
    assert json.loads(text)["best"] == result.best().number
    assert again.to_dict() == result.to_dict()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_search_whose_trials_all_fail_ends_with_an_error(value: float, tmp_path: Path) -> None:
    def broken(config: SubnetConfig) -> dict[str, float]:
        return {"loss": value, "params": 1.0}

    for trials in (4, 4, 6):  # again from the journal alone
        match = f"all {trials} sub-networks .* NaN or infinite\ntry: dtype=float32"
        with pytest.raises(ElastuneError, match=match):
            run(tmp_path / "a", trials, objective=broken)
    result = SearchResult(tuple(TrialStore(tmp_path / "a", VALUES).trials()))
    assert len(result.trials) == 6
    assert result.to_dict()["best"] is None


def test_the_journal_holds_what_earlier_versions_wrote(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "a"))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name="elastune",
        directions=["minimize"] * 2,
    )
    study.set_user_attr("values", list(VALUES))
    whole = run(tmp_path / "whole", 9)
    for trial in whole.trials[:5]:
        attrs = {"config": trial.config.to_json()}
        values = list(trial.values.values())
        study.add_trial(optuna.trial.create_trial(values=values, user_attrs=attrs))
    assert run(tmp_path / "a", 9) == whole


# --- the objective --------------------------------------------------------------------------------


@pytest.mark.parametrize("against", ["params", "nonzero", "macs", "block_macs"])
def test_the_objective_is_the_loss_against_the_chosen_cost(against: Any) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer)
    space = lora_space(model, [8, 4]) + structure_space(model, ffn=[1.0, 0.5], round_to=8)
    net = SuperNetwork(model, space)
    fill_adapters(net)
    count = CostModel(net, 16)
    examples = [Example(f"What is {i} + 4?", f" It is {i + 4}.", str(i), str(i)) for i in range(3)]
    options: Any = {"kind": "loss", "against": against}
    task = Custom.__new__(Custom)  # a causal-lm task; its data are not looked at
    objective, values = make_objective(net, tokenizer, task, examples, count, **options)
    assert values == ("loss", against)
    for config in (space.smallest(), space.heuristic()):
        measured = objective(config)
        assert {name: measured[name] for name in vars(count(config))} == vars(count(config))
        with net.active(config):
            assert measured["loss"] == pytest.approx(mean_loss(model, tokenizer, examples).loss)
    default = make_objective(net, tokenizer, task, examples, count, kind="loss")[1]
    assert default == ("loss", "params")


def test_recipes_offer_every_algorithm_and_costs_that_are_counted_and_drawn() -> None:
    fields = SearchConfig.model_fields
    assert set(get_args(fields["algorithm"].annotation)) == set(ALGORITHMS)
    costs = set(get_args(fields["cost"].annotation))
    assert costs - {"latency_ms", "decode_latency_ms"} <= set(Cost.__dataclass_fields__)
    assert costs < set(COSTS)


# --- what is refused ------------------------------------------------------------------------------


def test_unknown_algorithms_are_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match=r"'randon' \(did you mean 'random'\?\); known are"):
        run(tmp_path / "a", algorithm="randon")
    assert not (tmp_path / "a").exists()


def test_starts_outside_of_the_space_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidSubnet, match="nearest is 8"):
        run(tmp_path / "a", start=[SubnetConfig({**SPACE.largest(), "d3": 7})])
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
