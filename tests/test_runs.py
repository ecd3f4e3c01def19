"""`elastune runs` and `elastune space`: what the terminal is told of runs and search spaces."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_cli import cli, refused
from tiny_run import save_recipe, save_sums, save_tiny_model, tiny_recipe

from elastune.errors import BadRecipe
from elastune.files import read_json, write_json
from elastune.report import find_runs, read_run, runs_table, space_table
from elastune.report.runs import differing, shown_systems
from elastune.space import ElasticDim, SearchSpace


def text_of(table: Any) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run, one with another rate that stopped after its base, one that is damaged."""
    folder = tmp_path_factory.mktemp("all")
    model, data = save_tiny_model(folder / "model"), save_sums(folder / "data")
    recipe = tiny_recipe(model, data, baselines=["sparse"], search={"trials": 0})
    first = save_recipe(folder / "a.yaml", recipe)
    assert cli("run", first, "-o", folder / "runs" / "a").exit_code == 0
    set_ = ["--set", "train.learning_rate=0.5"]
    assert cli("sparsify", first, "-o", folder / "runs" / "b", *set_).exit_code == 0
    shutil.copytree(folder / "runs" / "a", folder / "runs" / "deep" / "c")
    (folder / "runs" / "deep" / "c" / "metrics.json").write_text("{")
    return folder / "runs"


def test_runs_are_found_two_levels_deep_and_by_their_own_name(runs: Path) -> None:
    found = [runs / "a", runs / "b", runs / "deep" / "c"]
    assert find_runs([runs]) == found
    assert find_runs([runs / "b", runs / "a"]) == [runs / "b", runs / "a"]
    with pytest.raises(BadRecipe, match=r"none of the folders has a recipe\.yaml"):
        find_runs([runs / "a" / "base"])


def test_runs_tell_state_scores_and_what_differs_and_damage_hides_no_other(runs: Path) -> None:
    rows = json.loads(cli("runs", runs, "--json").stdout)["runs"]
    assert [row["state"].partition(":")[0] for row in rows] == [
        "done",
        "after sparsify",
        "unreadable",
    ]
    assert rows[0]["systems"] == read_json(runs / "a" / "metrics.json")["rows"]
    stages = read_json(runs / "a" / "manifest.json")["stages"].values()
    assert rows[0]["seconds"] == pytest.approx(sum(stage["seconds"] for stage in stages))
    assert differing(rows[:2]) == {"train.learning_rate": [0.01, 0.5]}
    shown = cli("runs", runs).stdout
    assert "settings that differ" in shown
    assert "train.learning_rate" in shown


def test_a_stage_that_was_begun_is_where_a_run_is(runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "a", tmp_path / "run"))
    manifest = read_json(run / "manifest.json")
    manifest["stages"]["train"]["status"] = "started"
    write_json(run / "manifest.json", manifest)
    assert read_run(run)["state"] == "at train"


def test_only_the_systems_asked_for_have_a_row(runs: Path) -> None:
    row = read_run(runs / "a")
    assert [s.name for s in shown_systems(row, ["smallest"])] == ["smallest"]
    names = text_of(runs_table([row], ["smallest", "sparse"]))
    assert "smallest" in names
    assert "largest" not in names


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    assert "elastune run RECIPE" in refused(cli("runs", tmp_path))
    assert "no folder at" in refused(cli("runs", tmp_path / "none"))


def test_a_space_is_listed_by_kind_with_the_layers_it_is_of() -> None:
    space = SearchSpace(
        tuple(
            ElasticDim(f"layers.{layer}.ffn", "ffn", (64, 32), (f"m{layer}",))
            for layer in (0, 1, 2, 5)
        )
    )
    shown = text_of(space_table(space))
    assert "layers.*.ffn" in shown
    assert "64, 32" in shown
    assert "0-2, 5" in shown


def test_space_shows_the_ends_with_the_cost_that_the_saved_models_have(runs: Path) -> None:
    shown = cli("space", runs / "a").stdout
    rows = {row["name"]: row for row in read_json(runs / "a" / "metrics.json")["rows"]}
    for name in ("largest", "heuristic", "smallest"):
        (line,) = [line for line in shown.splitlines() if line.lstrip().startswith(name)]
        thousands = rows[name]["params"] / 1e3
        assert f"{thousands:.2f}" in line
    assert json.loads(cli("space", runs / "a", "--json").stdout)["dims"]


def test_a_narrow_terminal_keeps_the_scores_whole(runs: Path) -> None:
    rows = [read_run(folder) for folder in find_runs([runs])]
    screen = Console(width=80, file=io.StringIO())
    screen.print(runs_table(rows))
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    row = rows[0]["systems"][0]
    percent = f"{100 * row['score']:.1f} ± {100 * row['stderr']:.1f}"
    assert percent in shown
    assert "done, " in shown
    assert "…" not in shown
