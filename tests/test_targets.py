"""Targets and sweeps: sub-networks for limits that are named after the training and the search."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_run import cli, save_recipe, save_sums, save_tiny_model, tiny_recipe
from transformers import AutoModelForCausalLM

from elastune.artifacts import RunDirectory
from elastune.choose import targeted
from elastune.errors import BadRecipe
from elastune.files import read_json
from elastune.objective import ValidationObjective
from elastune.progress import Reporter
from elastune.run import Run
from elastune.search import Measurement
from elastune.search_stage import SearchWork
from elastune.space import SubnetConfig
from elastune.targets import find_target, sweep

# PEFT still asks for a property that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

STRUCTURE: dict[str, Any] = {
    "ffn": [1.0, 0.67, 0.34],
    "heads": [1.0, 0.5],
    "depth": [1],
    "round_to": 8,
    "order": "natural",
    "shared": True,
    "probes": 4,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets")
    save_tiny_model(folder / "model")
    save_sums(folder / "data")
    return folder


@pytest.fixture(scope="module")
def run(source: Path) -> Path:
    """A finished run of smaller models; tests read it and change copies."""
    recipe = tiny_recipe(
        source / "model",
        source / "data",
        method="lonas",
        structure=STRUCTURE,
        sparsify={"ratio": 0.0},
        adapter={"ranks": [4, 2]},
        search={"trials": 5, "front": 2, "random": 2},
        baselines=["dense"],
    )
    cli("run", save_recipe(source / "lonas.yaml", recipe), "--out", source / "lonas")
    return source / "lonas"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each configuration is measured."""
    found: Counter[str] = Counter()
    true = ValidationObjective.measure

    def counted(self: Any, config: SubnetConfig, rivals: Any) -> Measurement:
        found[config.to_json()] += 1
        return true(self, config, rivals)

    monkeypatch.setattr(ValidationObjective, "measure", counted)
    return found


def opened(folder: Path) -> Run:
    directory = RunDirectory(folder)
    return Run(directory, directory.recipe(), Reporter())


def extracted(folder: Path, *limits: str, more: tuple[Any, ...] = ()) -> dict[str, Any]:
    targets = [text for limit in limits for text in ("--target", limit)]
    return dict(json.loads(cli("extract", folder, *targets, "--json", *more).stdout))


def n_trials(folder: Path) -> int:
    """Return how many trials were begun, along any cost."""
    return (folder / "search" / "study.journal").read_text().count('"op_code":4,')


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in read_json(folder / "metrics.json")["rows"]}


# --- targets --------------------------------------------------------------------------------------


def test_a_target_is_written_keeps_its_limit_and_is_not_searched_for_again(
    copy: Path, measured: Counter[str]
) -> None:
    dense = rows(copy)["dense"]["params"]
    recipe = (copy / "recipe.yaml").read_text()
    first = extracted(copy, "params<=0.75x")
    assert measured
    assert first["subnets"] == [str(copy / "subnets" / "target-params-0.75x")]
    model = AutoModelForCausalLM.from_pretrained(first["subnets"][0])
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size == first["values"]["params"] <= 0.75 * dense
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    measured.clear()
    before = n_trials(copy)
    assert extracted(copy, "params<=0.75x") == first
    assert not measured
    assert n_trials(copy) == before
    assert (copy / "recipe.yaml").read_text() == recipe
    extracted(copy, "params<=0.75x", more=("--trials", 9))
    assert len(measured) in (0, 1)  # one more than before, where the first was not near already


def test_a_target_of_ranks_is_a_plain_peft_adapter(source: Path) -> None:
    recipe = tiny_recipe(source / "model", source / "data", baselines=[])
    recipe["train"] |= {"max_steps": 2}
    out = source / "shears"
    cli("run", save_recipe(source / "shears.yaml", recipe), "--out", out)
    costs = sorted(
        t["values"]["params"] for t in read_json(out / "search" / "trials.json")["trials"]
    )
    bound = int((costs[0] + costs[-1]) / 2)
    found = extracted(out, f"params<={bound}", more=("--name", "half"))
    assert found["subnets"] == [str(out / "subnets" / "half")]
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    size = sum(parameter.numel() for parameter in base.parameters())
    model = PeftModel.from_pretrained(base, found["subnets"][0])
    extra = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert size + extra == found["values"]["params"] <= bound
    # The only sub-networks that take less time are none: ranks are merged.
    assert (
        "only ranks are elastic" in cli("extract", out, "--target", "latency<=0.5x", code=2).output
    )


def test_several_limits_hold_at_once(copy: Path) -> None:
    table = rows(copy)
    loss = table and read_json(copy / "search" / "trials.json")["trials"]
    bound = sorted(trial["values"]["loss"] for trial in loss)[-2]
    limits = ["params<=0.95x", "macs<=0.9x", f"loss<={bound}", "params>=0.5x"]
    found = extracted(copy, *limits, more=("--name", "several"))
    values, dense = found["values"], table["dense"]
    assert 0.5 * dense["params"] <= values["params"] <= 0.95 * dense["params"]
    assert values["macs"] <= 0.9 * dense["macs"]
    assert values["loss"] <= bound
    kept = read_json(copy / "search" / "targets.json")["subnets"]["several"]
    assert kept["config"] == found["config"]
    assert len(kept["limits"]) == 4


def test_a_target_that_cannot_be_met_tells_the_closest_and_leaves_nothing(
    copy: Path, measured: Counter[str]
) -> None:
    output = cli("extract", copy, "--target", "params<=0.01x", code=2).output
    smallest = rows(copy)["smallest"]["params"]
    assert f"the smallest sub-network has params {smallest} where the limit is" in output
    assert not measured
    lowest = min(
        trial["values"]["loss"] for trial in read_json(copy / "search" / "trials.json")["trials"]
    )
    output = cli("extract", copy, "--target", "loss<=0.01", "--trials", 2, code=2).output
    assert f"none of the {5 + 2} sub-networks that were tried keeps loss<=0.01; the" in output
    closest = float(output.partition("has loss ")[2].split()[0])
    assert 0.01 < closest <= lowest + 1e-6  # what is told is rounded
    assert not (copy / "search" / "targets.json").exists()
    assert {path.name for path in (copy / "subnets").iterdir()} == {
        *("largest", "heuristic", "smallest", "best")
    }
    found = find_target(opened(copy), ["params<=0.01x"], trials=0, name="near")
    assert found.missed["params"][0] == smallest
    assert targeted(opened(copy)) == {"near": found.config}


def test_names_that_other_sub_networks_have_are_refused(copy: Path) -> None:
    for name in ("best", "dense", "front-3", "random-best", "largest"):
        with pytest.raises(BadRecipe, match="taken"):
            find_target(opened(copy), ["params<=0.9x"], name=name)
    with pytest.raises(BadRecipe, match="letter or digit"):
        find_target(opened(copy), ["params<=0.9x"], name=".x")
    low, high = (find_target(opened(copy), [f"params{s}0.9x"], trials=0) for s in (">=", "<="))
    assert low.name != high.name


# --- other costs than the search's ----------------------------------------------------------------


def test_another_cost_takes_over_what_was_measured(copy: Path, measured: Counter[str]) -> None:
    before = {json.dumps(t["config"]): t for t in read_json(copy / "search/trials.json")["trials"]}
    work = opened(copy)
    recipe = work.recipe
    first = find_target(work, ["macs<=0.8x"], trials=3)
    assert work.recipe is recipe
    assert not first.missed
    assert measured.keys().isdisjoint(before)
    assert set(measured.values()) <= {1}
    along_macs = set(measured)
    find_target(work, ["decode_macs<=0.8x"], trials=0)
    ours = SearchWork(work)
    assert {config.to_json() for config in ours.elsewhere} == along_macs | before.keys()
    found = ours.search(0).trials
    assert [json.dumps(dict(trial.config)) for trial in found] == [*before]  # its own, no more
    second = find_target(work, ["macs<=0.8x", "params<=0.9x"], trials=0)
    found = SearchWork(work).search(0).trials
    assert [json.dumps(dict(trial.config)) for trial in found[: len(before)]] == [*before]
    assert {trial.config.to_json() for trial in found[len(before) :]} == along_macs
    assert second.values["loss"] == first.values["loss"]
    assert set(measured) == along_macs
    assert set(measured.values()) == {1}


def test_a_target_leaves_the_search_and_the_rows_of_the_run_as_they_are(copy: Path) -> None:
    before = rows(copy)
    assert {"best", "random-best"} <= set(before)
    trials = (copy / "search" / "trials.json").read_bytes()
    extracted(copy, "macs<=0.8x")
    cli("run", copy)
    after = rows(copy)
    assert set(after) == {*before, "target-macs-0.8x"}
    assert all(after[name] == row for name, row in before.items())
    assert (copy / "search" / "trials.json").read_bytes() == trials


# --- sweeps ---------------------------------------------------------------------------------------


def test_a_sweep_is_a_table_of_falling_budgets(copy: Path) -> None:
    before = rows(copy)
    parts = "0.6,0.9,0.75,0.05"
    told = json.loads(cli("sweep", copy, "--cost", "macs", "--parts", parts, "--json").stdout)
    assert [row["limit"] for row in told["sweep"]] == [
        *("macs<=0.9x", "macs<=0.75x", "macs<=0.6x", "macs<=0.05x")
    ]
    *met, missed = told["sweep"]
    for row, part in zip(met, (0.9, 0.75, 0.6), strict=True):
        assert row["value"] <= part * before["dense"]["macs"]
        assert row["part"] == row["value"] / before["dense"]["macs"]
        assert row["missed"] == {}
    for dearer, cheaper in itertools.pairwise(met):
        assert dearer["value"] >= cheaper["value"]
        assert dearer["validation"]["loss"] <= cheaper["validation"]["loss"]
    assert missed["missed"]["macs"][0] == missed["value"] == before["smallest"]["macs"]
    after = rows(copy)
    assert set(after) == {*before, *(row["name"] for row in met)}
    for row in met:
        assert after[row["name"]]["macs"] == row["value"]
        assert after[row["name"]]["config"] == row["config"]
    count = n_trials(copy)
    output = cli("sweep", copy, "--cost", "macs", "--parts", "0.9,0.6").stdout
    assert n_trials(copy) == count
    lines = [line for line in output.splitlines() if "macs<=" in line]
    assert [line.split()[0] for line in lines] == ["macs<=0.9x", "macs<=0.6x"]
    assert f"{met[0]['value']:,.0f}" in lines[0]


def test_sweeps_of_nothing_or_of_more_than_the_whole_are_refused(run: Path) -> None:
    for part in (0.0, 1.5, -1.0, float("nan")):
        with pytest.raises(BadRecipe, match="between 0 and 1"):
            sweep(opened(run), "macs", [part])
    with pytest.raises(BadRecipe, match="no part"):
        sweep(opened(run), "macs", [])
    with pytest.raises(BadRecipe, match="no limit can be set on"):
        sweep(opened(run), "speed", [0.5])
    assert "must be numbers" in cli("sweep", run, "--parts", "a,b", code=2).output
