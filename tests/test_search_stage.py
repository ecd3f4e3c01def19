"""The search of a run: limits, what is compared, going on, workers, kills, what kills workers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from search_worker import SPACE, VALUES, measure
from tiny_run import cli, save_recipe, save_sums, save_tiny_model, tiny_recipe

from elastune.artifacts import RunDirectory
from elastune.evaluate import mean_loss
from elastune.files import read_json
from elastune.latency_table import LatencyTable
from elastune.models import load_model
from elastune.objective import ValidationObjective
from elastune.progress import Reporter
from elastune.run import Run
from elastune.search import ALGORITHMS, Known, Measurement, search
from elastune.search.store import TrialStore
from elastune.search.stored import stored_trials
from elastune.search.workers import Worker, machine
from elastune.search_stage import SearchWork
from elastune.space import ElasticDim, SearchSpace, SubnetConfig

TRIALS = 8
GONE = Worker(machine(), 2**22 + 1, 0.0, "x")  # a number above those of processes
LIMITS = ["params<=0.9x", "loss<=largest+2"]
STRUCTURE: dict[str, Any] = {
    "ffn": [1.0, 0.67, 0.34],
    "heads": [1.0, 0.5],
    "depth": [1],
    "round_to": 8,
    "order": "natural",
    "probes": 4,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests read it and change copies."""
    folder = tmp_path_factory.mktemp("stage")
    model, data = save_tiny_model(folder / "model"), save_sums(folder / "data", n_train=60)
    recipe = tiny_recipe(
        model,
        data,
        method="lonas",
        structure=STRUCTURE,
        sparsify={"ratio": 0.0},
        adapter={"ranks": [4, 2]},
        search={"trials": TRIALS, "front": 3, "random": 3, "limits": LIMITS},
        baselines=["dense"],
    )
    recipe["data"] = {"n_validation": 20}
    cli("run", save_recipe(folder / "r.yaml", recipe), "--out", folder / "run")
    return folder / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def searched(folder: Path) -> dict[str, Any]:
    return dict(read_json(folder / "search" / "trials.json"))


def configs(folder: Path) -> list[str]:
    """Return the configurations of the trials, as text."""
    return [json.dumps(trial["config"]) for trial in searched(folder)["trials"]]


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in read_json(folder / "metrics.json")["rows"]}


def opened(folder: Path) -> Run:
    directory = RunDirectory(folder)
    return Run(directory, directory.recipe(), Reporter())


def finished(folder: Path) -> int:
    """Return how many trials the journal holds, without locking it."""
    states = re.findall(r'"state":\s*(\d+)', (folder / "search" / "study.journal").read_text())
    return states.count("1")


# --- what a search begins with --------------------------------------------------------------------


ESTIMATED = "estimated_losses.params.json"


def test_losses_are_estimated_once_for_all_dims_or_measured_for_those_of_the_structure(
    run: Path, copy: Path
) -> None:
    space = SearchSpace.from_dict(read_json(run / "space.json"))
    losses = read_json(run / "search" / ESTIMATED)["losses"]
    assert set(losses) == {dim.name for dim in space.dims}
    assert all(losses[dim.name][str(dim.choices[0])] == 0 for dim in space.dims)
    assert len({loss for of_dim in losses.values() for loss in of_dim.values()}) > len(losses)
    assert not (run / "search" / "single_choices.jsonl").exists()
    kept = (copy / "search" / ESTIMATED).stat().st_mtime_ns
    cli("search", copy, "--trials", TRIALS + 1)
    assert (copy / "search" / ESTIMATED).stat().st_mtime_ns == kept
    cli("search", copy, "--set", "search.losses=measured", "--update")
    lines = (copy / "search" / "single_choices.jsonl").read_text().splitlines()[1:]
    structure = {dim.name for dim in space.dims if dim.kind != "rank"}
    assert {json.loads(line)["dim"] for line in lines} - {""} == structure


# --- limits, and what is compared -----------------------------------------------------------------


def test_the_best_is_the_best_that_keeps_all_limits(run: Path) -> None:
    found, table = searched(run), rows(run)
    bounds = found["about"]["bounds"]
    assert bounds["params"] == [None, 0.9 * table["dense"]["params"]]
    keeps = [
        trial
        for trial in found["trials"]
        if trial["values"]["params"] <= bounds["params"][1]
        and trial["values"]["loss"] <= bounds["loss"][1]
    ]
    best = min(keeps, key=lambda trial: trial["values"]["loss"])
    assert 0 < len(keeps) < TRIALS
    assert table["best"]["config"] == best["config"]
    assert table["best"]["params"] <= 0.9 * table["dense"]["params"] < table["largest"]["params"]
    told = json.loads(cli("search", run, "--json").stdout)
    assert told["best"] == best["config"]
    assert told["missed"] == found["about"]["missed"] == {}


def test_a_limit_relative_to_a_system_is_what_that_system_measures(run: Path, copy: Path) -> None:
    trials = searched(run)["trials"]
    space = SearchSpace.from_dict(read_json(run / "space.json"))
    largest = next(t for t in trials if t["config"] == dict(space.largest()))
    bound = searched(run)["about"]["bounds"]["loss"]
    assert bound == [None, largest["values"]["loss"] + 2]
    work = opened(copy)
    model, tokenizer = load_model(work.recipe.model)
    expected = mean_loss(model, tokenizer, work.splits.validation).loss
    searching = SearchWork(work, ["loss<=dense+0.5", "loss<=1e9"])
    assert searching.bounds["loss"][1] == pytest.approx(expected + 0.5)
    known = read_json(copy / "search" / "reference_scores.json")["scores"]
    assert known == {"largest loss": largest["values"]["loss"], "dense loss": expected}


def test_limits_on_scores_hold_the_error(copy: Path) -> None:
    text = cli("search", copy, "--set", "search.objective=score", "--update", code=2).output
    assert "does not measure loss" in text
    args = ["--set", "search.objective=score", "--update", "--limit", "score>=dense-1.0"]
    cli("search", copy, *args, "--trials", "4")
    dense = read_json(copy / "search" / "reference_scores.json")["scores"]["dense score"]
    bounds = searched(copy)["about"]["bounds"]
    assert bounds == {"error": [None, pytest.approx(1 - (dense - 0.01))]}


def test_limits_that_nothing_keeps_are_told_with_the_closest(copy: Path) -> None:
    result = cli("search", copy, "--limit", "params<=1000")
    value = read_json(copy / "search" / "trials.json")["about"]["missed"]["params"][0]
    assert value == min(t["values"]["params"] for t in searched(copy)["trials"])
    assert f"missed: params is {value:.6g}, the limit 1000" in result.stdout


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("score>=dense-1", "a search by loss does not measure score"),
        ("memory<=1GB", "does not measure memory_mb"),
        ("loss<=denes+0.1", "did you mean 'dense'?"),
        ("loss<=dense+lora+1", "the bound must be"),
        ("params<=ten", "nothing is known of 'ten'"),
    ],
)
def test_limits_that_cannot_be_measured_are_refused_and_not_kept(
    limit: str, message: str, run: Path
) -> None:
    before = (run / "recipe.yaml").read_text()
    output = cli("search", run, "--limit", limit, code=2).output
    assert re.search(message, " ".join(output.split()))
    assert (run / "recipe.yaml").read_text() == before


def test_random_best_and_front_are_scored_and_written_only_when_asked(copy: Path) -> None:
    names = set(rows(copy))
    front = {name for name in names if name.startswith("front-")}
    assert 1 <= len(front) <= 3
    assert "random-best" in names
    found = searched(copy)
    by_number = {trial["number"]: trial for trial in found["trials"]}
    for name in front:
        number = int(name.removeprefix("front-"))
        assert number in found["pareto"]
        assert rows(copy)[name]["config"] == by_number[number]["config"]
    random = found["about"]["random"]
    lowest = min(random, key=lambda trial: trial["values"]["loss"])
    assert len(random) == 3
    assert rows(copy)["random-best"]["config"] == lowest["config"]
    written = {path.name for path in (copy / "subnets").iterdir()}
    assert written == {"largest", "heuristic", "smallest", "best"}
    cli("extract", copy, "-c", "random-best")
    assert {path.name for path in (copy / "subnets").iterdir()} == written | {"random-best"}


# --- going on -------------------------------------------------------------------------------------


def test_more_trials_and_another_algorithm_go_on_from_the_trials_there_are(copy: Path) -> None:
    first = configs(copy)
    assert len(first) == len(set(first)) == TRIALS
    cli("search", copy, "--trials", TRIALS + 4)
    more = configs(copy)
    assert more[:TRIALS] == first
    assert len(more) == len(set(more)) == TRIALS + 4
    cli("search", copy, "--algorithm", "nsga2", "--trials", TRIALS + 7)
    others = configs(copy)
    assert others[: len(more)] == more
    assert len(others) == len(set(others)) == TRIALS + 7
    assert searched(copy)["about"]["algorithm"] == "nsga2"


def test_fewer_trials_than_there_are_keep_all(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(ValidationObjective, "measure", refuse)
    before = configs(copy)
    cli("search", copy, "--trials", 3)
    assert configs(copy) == before
    assert RunDirectory(copy).recipe().search.trials == 3


def test_a_storage_that_cannot_be_opened_is_refused_and_not_kept(copy: Path) -> None:
    for url in ("postgresql://me:secret@127.0.0.1:1/db", "nosuch://host/db"):
        output = cli("search", copy, "--trials", 9, "--storage", url, code=2).output
        assert "cannot search in" in output
        assert "secret" not in output
    assert RunDirectory(copy).recipe().search.storage is None
    cli("search", copy, "--trials", 9)
    assert len(configs(copy)) == 9


def test_the_latency_table_is_measured_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[LatencyTable] = []
    true = LatencyTable.measure

    def counted(*args: Any, **kwargs: Any) -> LatencyTable:
        measured.append(true(*args, **kwargs))
        return measured[-1]

    monkeypatch.setattr(LatencyTable, "measure", counted)
    cli("search", copy, "--limit", "latency<=0.99x")
    cli("search", copy, "--limit", "latency<=1.5x", "--trials", 9)
    assert len(measured) == 1
    trials = searched(copy)["trials"]
    assert "latency_ms" in trials[-1]["measured"]
    config = SubnetConfig(trials[-1]["config"])
    table = LatencyTable.load(copy / "search" / "latency_table.json")
    assert trials[-1]["measured"]["latency_ms"] == table.predict(config).prefill_ms


# --- workers and kills ----------------------------------------------------------------------------


def test_two_workers_make_the_trials_asked_for_and_none_twice(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = copy / "search" / "study.journal"
    before = finished(copy)
    true = ValidationObjective.measure

    def waits(self: Any, config: SubnetConfig, rivals: Any) -> Measurement:
        deadline = time.monotonic() + 100
        while len(set(re.findall(r'"pid":\s*(\d+)', journal.read_text()))) < 2:
            assert time.monotonic() < deadline, "no other worker came"
            time.sleep(0.05)
        return true(self, config, rivals)

    monkeypatch.setattr(ValidationObjective, "measure", waits)
    cli(
        "search",
        copy,
        "--workers",
        2,
        "--trials",
        TRIALS + 12,
        "--set",
        "search.random=0",
        "--update",
    )
    found = configs(copy)
    assert len(found) == len(set(found)) == TRIALS + 12
    assert finished(copy) - before == 12
    assert '"died"' not in journal.read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_search_killed_in_the_middle_goes_on_to_the_number_of_trials(copy: Path) -> None:
    first, wanted = configs(copy), TRIALS + 30
    before = finished(copy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which the child does not use
        child = os.fork()
    if not child:
        torch.set_num_threads(1)
        cli("search", copy, "--trials", wanted)
        os._exit(1)
    while finished(copy) < before + 2:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    done = finished(copy) - before
    assert 2 <= done < 30
    assert read_json(copy / "manifest.json")["stages"]["search"]["status"] == "started"
    cli("search", copy)  # the recipe has the number
    found = configs(copy)
    assert found[:TRIALS] == first
    assert len(found) == len(set(found)) == wanted
    assert finished(copy) - before == 30


DEADLY = """
import json, os, signal, sys
from search_worker import SPACE, VALUES, measure
from elastune.search import search

def objective(config):
    if config == SPACE.largest():
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(config)

ends = []
while not ends or ends[-1] == signal.SIGKILL:
    child = os.fork()
    if not child:
        search(SPACE, objective, values=VALUES, trials=6, storage=sys.argv[1])
        os._exit(0)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) * -1)
print(json.dumps(ends))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_what_kills_its_worker_twice_is_a_failed_trial(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DEADLY, str(tmp_path / "journal")]
    folder = Path(__file__).parent
    told = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
    assert json.loads(told.stdout) == [9, 9, 0]
    assert "its trial (24x6) is failed" in told.stderr
    result = search(SPACE, measure, values=VALUES, trials=6, storage=tmp_path / "journal")
    assert [trial.config for trial in result.trials if trial.failed] == [SPACE.largest()]
    assert [trial.number for trial in result.trials] == list(range(6))
    assert len({trial.config for trial in result.trials}) == 6


def lost(path: Path, config: SubnetConfig) -> None:
    """Leave what a worker leaves that dies while it measures, and notice earlier ones."""
    store = TrialStore(path, VALUES)
    store.abandon_dead(store.read())
    store.open_ticket(GONE)
    store.claim(config)


def test_one_death_is_tried_again_and_what_was_interrupted_is_no_death(tmp_path: Path) -> None:
    config, seen = SPACE.smallest(), []

    def objective(config: SubnetConfig) -> dict[str, float]:
        seen.append(config)
        if len(seen) <= 3:
            raise KeyboardInterrupt
        return measure(config)

    options: Any = {"values": VALUES, "trials": 4, "storage": tmp_path / "a", "start": [config]}
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            search(SPACE, objective, **options)
    lost(tmp_path / "a", config)
    result = search(SPACE, objective, **options)
    assert seen[:4] == [config] * 4
    assert not any(trial.failed for trial in result.trials)


def test_deaths_count_for_each_configuration_and_among_workers(tmp_path: Path) -> None:
    first, second = SPACE.largest(), SPACE.smallest()
    lost(tmp_path / "a", first)
    lost(tmp_path / "a", second)
    lost(tmp_path / "a", first)
    result = search(SPACE, measure, values=VALUES, trials=5, storage=tmp_path / "a")
    assert [trial.config for trial in result.trials if trial.failed] == [first]
    assert second in [trial.config for trial in result.trials if not trial.failed]


@pytest.mark.parametrize(
    "name", ["random", "hill_climb", "exhaustive", "tpe", "nsga2", "auto", "milp"]
)
def test_nothing_is_proposed_where_all_was_tried(name: str) -> None:
    space = SearchSpace([ElasticDim(f"d{i}", "rank", (4, 2), (f"m{i}",)) for i in range(3)])

    def values(config: SubnetConfig) -> dict[str, float]:
        return {"loss": float(sum(config.values())) ** -1, "params": float(sum(config.values()))}

    result = search(space, values, values=VALUES, algorithm=name, trials=99)
    assert len(result.trials) == 8
    known = Known(VALUES, costs=values)
    assert ALGORITHMS[name](space, result.trials, np.random.default_rng(0), known) is None


# --- what searches along other costs measured -----------------------------------------------------


def test_a_search_along_another_cost_measures_nothing_twice(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {json.dumps(t["config"]): t for t in searched(copy)["trials"]}
    measured: list[str] = []
    true = ValidationObjective.measure

    def noted(self: Any, config: SubnetConfig, rivals: Any) -> Measurement:
        measured.append(config.to_json())
        return true(self, config, rivals)

    monkeypatch.setattr(ValidationObjective, "measure", noted)
    cli("search", copy, "--set", "search.cost=macs", "--set", "search.random=0", "--update")
    new = {json.dumps(t["config"]): t for t in searched(copy)["trials"]}
    assert len(new) == TRIALS
    assert len(new.keys() & old.keys()) >= 3  # heuristic, largest, smallest at least
    assert Counter(measured) == Counter(new.keys() - old.keys())
    for name in new.keys() & old.keys():
        assert new[name]["values"]["loss"] == old[name]["values"]["loss"]
        assert new[name]["values"]["macs"] == old[name]["measured"]["macs"]
        assert new[name]["equivalents"] == 0


def test_what_a_race_dropped_is_taken_over_only_where_a_rival_is_no_dearer(copy: Path) -> None:
    work = SearchWork(opened(copy))
    space = work.net.space
    dear, cheap = space.largest(), space.smallest()
    fair = SubnetConfig({**cheap, **{d.name: 4 for d in space.dims if d.kind == "rank"}})
    costs = [work.costs(config)["params"] for config in (cheap, fair, dear)]
    assert costs[0] == costs[1] < costs[2]  # merged ranks take nothing
    outcomes = np.random.default_rng(0).normal(size=20).astype(np.float32)
    worse = np.where(np.arange(20) < 16, outcomes + 1, np.nan).astype(np.float32)
    along_macs = SearchWork(opened(copy), [])
    along_macs.cfg = along_macs.cfg.model_copy(update={"cost": "macs"})

    def store(config: SubnetConfig, outcomes: np.ndarray, *, dropped: bool) -> None:
        study = TrialStore(work.storage, ("loss", "macs"), study=along_macs.study)
        study.open_ticket(GONE)
        study.claim(config)
        study.finish(Measurement({"loss": 1.0, "macs": 1.0}, dropped, outcomes))
        work.__dict__.pop("elsewhere", None)

    store(cheap, worse, dropped=True)
    store(dear, outcomes, dropped=False)
    assert list(work.elsewhere) == [dear]
    store(fair, outcomes, dropped=False)
    assert set(work.elsewhere) == {dear, fair, cheap}
    assert work.elsewhere[cheap].dropped
    assert work.elsewhere[cheap].values["params"] == costs[0]
    assert stored_trials(copy / "nowhere", {"x": VALUES}) == []
    assert stored_trials(work.storage, {"x": VALUES}) == []
