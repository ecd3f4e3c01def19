"""Several workers on one search, and searches killed anywhere: no trial is lost or repeated."""

from __future__ import annotations

import json
import logging
import math
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import search_worker
from search_worker import (
    SPACE,
    VALUES,
    Noted,
    begin,
    check_three_workers_one_of_which_is_killed,
    measure,
    noted,
    start_worker,
    wait_for,
)

from elastune.errors import BadArtifact, BadRecipe
from elastune.search import ALGORITHMS, Known, Measurement, SearchResult, Trial, search, store
from elastune.search.base import non_dominated
from elastune.search.store import TrialStore
from elastune.search.workers import Worker, at_work
from elastune.space import ElasticDim, SearchSpace, SubnetConfig


def run(storage: Path | str | None, trials: int = 12, **options: Any) -> SearchResult:
    objective = options.pop("objective", measure)
    settings: Any = {"values": VALUES, "algorithm": "hill_climb"} | options
    return search(SPACE, objective, trials=trials, storage=storage, **settings)


def study_of(path: Path, name: str = "elastune") -> optuna.Study:
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name=name, storage=storage)


# --- several workers ------------------------------------------------------------------------------


def test_three_workers_on_a_journal_lose_nothing_when_one_is_killed(tmp_path: Path) -> None:
    check_three_workers_one_of_which_is_killed(tmp_path, str(tmp_path / "journal"))


def test_workers_in_threads_measure_everything_once(tmp_path: Path) -> None:
    objective = Noted(tmp_path / "log", 0.005)
    results: list[SearchResult] = []

    def work() -> None:
        results.append(run(tmp_path / "journal", 30, objective=objective))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(result == results[0] for result in results)
    configs = [trial.config.to_json() for trial in results[0].trials]
    assert noted(tmp_path / "log", "begin") == Counter(configs)
    assert len(configs) == len(set(configs)) == 30


def test_a_worker_of_another_machine_is_given_up_when_its_signs_of_life_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    journal = tmp_path / "journal"
    far = start_worker(tmp_path, str(journal), trials=4, hang_at=1, machine="elsewhere", beat=0.1)
    begin(tmp_path, [far])
    wait_for(lambda: noted(tmp_path / "log", "hang"))
    monkeypatch.setattr(store, "GRACE_SECONDS", 1.5)
    alive = threading.Timer(3.0, far.kill)  # which is longer than the grace
    alive.start()
    with caplog.at_level(logging.INFO, "elastune"):
        result = run(journal, 4, objective=Noted(tmp_path / "log"))
    assert not alive.is_alive()  # it was waited for as long as it lived
    far.communicate()
    configs = [trial.config.to_json() for trial in result.trials]
    assert noted(tmp_path / "log", "end") == Counter(configs)
    assert noted(tmp_path / "log", "begin").total() == 5
    assert far.returncode == -signal.SIGKILL
    assert sum("worker of the search is gone" in text for text in caplog.messages) == 1


def test_a_worker_is_gone_with_its_process_and_its_search() -> None:
    with at_work(None) as worker:
        assert worker.is_gone() is False
        assert Worker.from_dict(json.loads(json.dumps(worker.to_dict()))) == worker
    assert worker.is_gone() is True
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    import psutil

    started = psutil.Process(child.pid).create_time()
    other = Worker(worker.machine, child.pid, started, "x")
    assert other.is_gone() is False
    assert Worker(worker.machine, child.pid, started - 100, "x").is_gone() is True  # reused number
    assert Worker("elsewhere", child.pid, started, "x").is_gone() is None
    child.kill()
    wait_for(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
    assert other.is_gone() is True  # nobody has asked for its exit status yet
    child.communicate()
    assert other.is_gone() is True
    assert Worker.from_dict({"pid": 1}) is None
    assert Worker.from_dict("x") is None


def test_a_trial_that_was_taken_away_is_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[SubnetConfig] = []

    def objective(config: SubnetConfig) -> dict[str, float]:
        calls.append(config)
        if len(calls) == 4:  # as one does who sees no sign of life
            study = study_of(tmp_path / "a")
            study.tell(study.trials[-1].number, state=optuna.trial.TrialState.FAIL)
        return measure(config)

    result = run(tmp_path / "a", 6, objective=objective)
    assert result == run(tmp_path / "b", 6)
    assert calls == [*[t.config for t in result.trials[:4]], *[t.config for t in result.trials[3:]]]
    assert caplog.messages == ["another worker took this one for dead, and its trial with it"]


# --- killed searches ------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("algorithm", ["auto", "hill_climb"])
def test_a_search_killed_at_any_write_goes_on_to_the_same_trials(
    algorithm: str, tmp_path: Path
) -> None:
    settings = {"folder": str(tmp_path), "algorithm": algorithm, "trials": 5, "kill": True}
    command = [sys.executable, search_worker.__file__, json.dumps(settings)]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert told["writes"] >= 4 * 5
    assert len(told["ends"]) == 2 * told["writes"]
    for killed_by, is_same, again in told["ends"]:
        assert killed_by == signal.SIGKILL
        assert is_same
        assert again in (0, 1)  # what the kill met unrecorded


def test_what_a_failing_objective_measured_is_tried_first_again(tmp_path: Path) -> None:
    seen: list[SubnetConfig] = []

    def breaks(config: SubnetConfig) -> dict[str, float]:
        seen.append(config)
        if len(seen) == 6:
            raise ValueError("no disk")
        return measure(config)

    with pytest.raises(ValueError, match="no disk"):
        run(tmp_path / "a", objective=breaks)
    after = run(tmp_path / "a", algorithm="random", seed=9)
    assert after.trials[5].config == seen[5]
    states = [trial.state.name for trial in study_of(tmp_path / "a").trials]
    assert states == ["COMPLETE"] * 5 + ["FAIL"] + ["COMPLETE"] * 7


# --- what is stored -------------------------------------------------------------------------------


class Race:
    """An objective that stops early, and measures more than the objectives."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.rivals: list[Sequence[Trial]] = []
        self.fails_at = fails_at

    def __call__(self, config: SubnetConfig) -> dict[str, float]:
        raise AssertionError("a racing objective is raced")

    def measure(self, config: SubnetConfig, rivals: Sequence[Trial]) -> Measurement:
        if len(self.rivals) == self.fails_at:
            raise KeyboardInterrupt
        self.rivals.append(rivals)
        values = measure(config)
        rng = np.random.default_rng(int(values["params"]))
        outcomes = rng.normal(size=7).astype(np.float32)
        outcomes[3:] = math.nan
        more = {"macs": values["params"] / 3, "latency": math.inf}
        dropped = int(values["params"]) % 3 == 0
        return Measurement(values | more, dropped, outcomes, equivalents=1 / 7)


LIMITS = {"params": (-math.inf, 90.0), "macs": (25.0, 29.0), "x": (1.0, 2.0)}


@pytest.mark.parametrize("algorithm", ["random", "hill_climb"])
def test_everything_measured_is_read_back_exactly(algorithm: str, tmp_path: Path) -> None:
    known = Known(VALUES, limits=LIMITS)
    options: Any = {"algorithm": algorithm, "known": known}
    whole = run(tmp_path / "whole", objective=Race(), **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", objective=Race(fails_at=7), **options)
    race = Race()
    resumed = run(tmp_path / "a", objective=race, **options)
    assert len(race.rivals) == 5
    for first, second in zip(whole.trials, resumed.trials, strict=True):
        assert first == second
        assert first.equivalents == second.equivalents == 1 / 7
        assert first.violation == second.violation
        assert first.outcomes is not None
        assert second.outcomes is not None
        assert first.outcomes.dtype == second.outcomes.dtype == np.float32
        assert np.array_equal(first.outcomes, second.outcomes, equal_nan=True)
        expected = Race().measure(first.config, ())
        assert {**first.values, **first.measured} == expected.values
        assert first.dropped == expected.dropped
        assert np.array_equal(first.outcomes, expected.outcomes, equal_nan=True)  # type: ignore[arg-type]
    assert {trial.dropped for trial in whole.trials} == {True, False}
    assert list(race.rivals[0]) == non_dominated(whole.trials[:7])
    text = (tmp_path / "a").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


def test_the_violation_is_the_part_by_which_limits_are_missed(tmp_path: Path) -> None:
    result = run(tmp_path / "a", objective=Race(), known=Known(VALUES, limits=LIMITS))
    for trial in result.trials:
        params, macs = trial.values["params"], trial.measured["macs"]
        expected = max(0.0, params - 90) / 90 + max(0.0, 25 - macs) / 25 + max(0.0, macs - 29) / 29
        assert trial.violation == pytest.approx(expected)
    assert {trial.violation > 0 for trial in result.trials} == {True, False}
    assert all(trial.violation == 0 for trial in run(tmp_path / "b").trials)


@pytest.mark.parametrize("kind", ["memory", "journal", "text", "sqlite"])
def test_every_storage_gives_the_same_trials(kind: str, tmp_path: Path) -> None:
    storages: dict[str, Path | str | None] = {
        "memory": None,
        "journal": tmp_path / "deep" / "journal",
        "text": str(tmp_path / "journal"),
        "sqlite": f"sqlite:///{tmp_path}/search.db",
    }
    storage = storages[kind]

    def half_broken(config: SubnetConfig) -> dict[str, float]:
        found = measure(config)
        return found | ({"loss": math.nan} if int(found["params"]) % 16 else {})

    options: Any = {"objective": half_broken}
    expected = run(tmp_path / "expected", **options)
    assert any(trial.failed for trial in expected.trials)
    run(storage, 5, **options)
    assert repr(run(storage, **options)) == repr(expected)


def test_a_storage_holds_several_studies(tmp_path: Path) -> None:
    first = run(tmp_path / "a", seed=1)
    other = run(tmp_path / "a", seed=2, study="other")
    assert other == run(tmp_path / "b", seed=2)
    assert run(tmp_path / "a", seed=1) == first != other


# --- where a search ends --------------------------------------------------------------------------


def test_a_search_ends_where_nothing_is_left_to_propose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def proposes_four(space: SearchSpace, trials: Any, rng: Any, known: Any) -> Any:
        return None if len(trials) == 4 else space.sample(rng)

    monkeypatch.setitem(ALGORITHMS, "four", proposes_four)  # type: ignore[arg-type]
    result = run(tmp_path / "a", algorithm="four")
    assert len(result.trials) == 4
    assert run(tmp_path / "a", algorithm="four") == result
    results: list[SearchResult] = []

    def work() -> None:
        objective = Noted(tmp_path / "log", 0.05)
        results.append(run(tmp_path / "b", algorithm="four", objective=objective))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [result] * 3
    assert noted(tmp_path / "log", "begin").total() == 4


def test_an_algorithm_that_repeats_itself_is_a_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALGORITHMS, "same", lambda space, *_: space.largest())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"proposed SubnetConfig\(24x6\) again"):
        run(tmp_path / "a", algorithm="same")


def test_no_trial_begins_after_the_time_is_up(tmp_path: Path) -> None:
    assert run(tmp_path / "a", seconds=0).trials == ()
    result = run(tmp_path / "a", 10_000, objective=Noted(tmp_path / "log", 0.4), seconds=1.0)
    assert 1 <= len(result.trials) <= 3
    assert noted(tmp_path / "log", "begin") == noted(tmp_path / "log", "end")
    assert run(tmp_path / "a", 12) == run(tmp_path / "b", 12)


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize("error", [MemoryError, OutOfMemoryError])
def test_a_trial_that_runs_out_of_memory_is_a_failed_one(
    error: type[Exception], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def heavy(config: SubnetConfig) -> dict[str, float]:
        if config == SPACE.largest():
            raise error("too much")
        return measure(config)

    result = run(tmp_path / "a", objective=heavy)
    assert [trial.number for trial in result.trials if trial.failed] == [1]
    assert caplog.messages == ["trial 1 failed: out of memory for 24x6"]
    assert repr(run(tmp_path / "a", objective=measure)) == repr(result)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://me:se:cr@t@127.0.0.1:1/db", r"//me:\*\*\*@127.*\ntry: start the server"),
        ("sqlite:////nowhere/at/all.db", r"all\.db: unable to open"),
        ("oracle://me:secret@host/db", r"cannot search in oracle://me:\*\*\*@host/db: "),
        ("nosuch://me:secret@host/db", r"try: a file path, postgresql://"),
        ("://", "cannot search in ://"),
    ],
)
def test_databases_that_cannot_be_used_are_named_without_the_password(
    url: str, message: str
) -> None:
    with pytest.raises(BadRecipe, match=message) as caught:
        run(url)
    assert "secret" not in str(caught.value)
    assert "se:cr" not in str(caught.value)


def test_a_missing_driver_is_answered_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(BadRecipe, match=r"driver for PostgreSQL\ntry: pip install elastune\[post"):
        run("postgresql://me@127.0.0.1:1/db")


def test_a_database_of_another_space_or_of_other_objectives_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/search.db"
    run(url, 3)
    with pytest.raises(BadArtifact, match=r"other objectives.*\ntry: another study"):
        search(SPACE, measure, values=("loss",), trials=4, storage=url)
    space = SearchSpace([ElasticDim("d0", "rank", (24, 16, 8), ("m0",))])
    with pytest.raises(BadArtifact, match=r"search\.db is of another search space\ntry: another s"):
        search(space, measure, values=VALUES, trials=4, storage=url)


def test_reading_a_store_changes_no_trial(tmp_path: Path) -> None:
    def breaks(config: SubnetConfig) -> dict[str, float]:
        if config == SPACE.smallest():
            raise KeyboardInterrupt
        return measure(config)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", objective=breaks)
    whole = run(tmp_path / "b")
    assert TrialStore(tmp_path / "a", VALUES).trials() == list(whole.trials[:2])
    assert TrialStore(tmp_path / "a", VALUES).trials() == list(whole.trials[:2])
    assert run(tmp_path / "a") == whole
