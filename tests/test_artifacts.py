"""The run directory: written whole or not at all, skipped only when nothing changed."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastune.artifacts import RunDirectory
from elastune.config import Recipe, make_recipe
from elastune.errors import BadArtifact, BadRecipe
from elastune.files import read_json, whole_folder, write_json, write_text
from elastune.inputs import fingerprint, source_hashes, stage_inputs


def recipe(**sections: Any) -> Recipe:
    return make_recipe({"model": "m", "task": "gsm8k"} | sections, "test")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.claim(recipe())
    return directory


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


class Killed(BaseException):
    """Stands for what ends a block other than success."""


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("had_one", [False, True])
def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, had_one: bool) -> None:
    target = tmp_path / "out"
    if had_one:
        target.mkdir()
        (target / "old").write_text("1")
    before = content(tmp_path)

    def replace_half() -> None:
        with whole_folder(target) as partial:
            (partial / "new").write_text("2")
            assert content(target) == ({"old": "1"} if had_one else {})
            raise Killed

    with pytest.raises(Killed):
        replace_half()
    assert content(tmp_path) == before
    with whole_folder(target) as partial:
        (partial / "new").write_text("2")
    assert content(tmp_path) == {"out/new": "2"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_swept_up(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-abc").mkdir()
    with whole_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_replaced_folder_can_be_read_by_others(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_json_that_cannot_be_written_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert read_json(path) == {"old": 1}


def test_missing_and_corrupt_json_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(BadArtifact, match=r"none\.json is missing"):
        read_json(tmp_path / "none.json")
    for bad in (b"{", b"\xff"):
        (tmp_path / "bad.json").write_bytes(bad)
        with pytest.raises(BadArtifact, match=r"bad\.json is corrupt"):
            read_json(tmp_path / "bad.json")


# --- stages -------------------------------------------------------------------------------------


def test_a_stage_is_done_for_its_own_inputs_only(run: RunDirectory) -> None:
    assert not run.is_done("train", "a")
    with run.stage("train", "a"):
        assert not run.is_done("train", "a")
    assert run.is_done("train", "a")
    assert not run.is_done("train", "b")
    assert not run.is_done("search", "a")
    assert RunDirectory(run.root).is_done("train", "a")


def test_a_stage_that_raised_is_not_done_and_keeps_its_outputs_to_go_on(run: RunDirectory) -> None:
    def train_half() -> None:
        with run.stage("train", "a", run.supernet):
            write_text(run.supernet / "checkpoint", "half")
            raise Killed

    with pytest.raises(Killed):
        train_half()
    assert not run.is_done("train", "a")
    with run.stage("train", "a", run.supernet):
        assert content(run.supernet) == {"checkpoint": "half"}
    assert run.is_done("train", "a")


def test_outputs_of_other_inputs_are_removed_first(run: RunDirectory) -> None:
    with run.stage("train", "a", run.supernet, run.space):
        write_text(run.supernet / "weights", "a")
        write_text(run.space, "a")
    with run.stage("train", "b", run.supernet, run.space):
        assert not run.supernet.exists()
        assert not run.space.exists()


def test_a_stage_whose_output_was_deleted_is_not_done(run: RunDirectory) -> None:
    with run.stage("train", "a", run.space):
        write_text(run.space, "a")
    run.space.unlink()
    assert not run.is_done("train", "a")


def test_the_manifest_adds_up_the_seconds_of_interrupted_stages(run: RunDirectory) -> None:
    for _ in range(2):
        with pytest.raises(Killed), run.stage("train", "a"):
            raise Killed
    row = run.manifest()["stages"]["train"]
    assert row["status"] == "started"
    assert row["seconds"] >= 0
    row["seconds"] = 100.0
    write_json(run.manifest_file, run.manifest() | {"stages": {"train": row}})
    with run.stage("train", "a"):
        pass
    assert 100 <= run.manifest()["stages"]["train"]["seconds"] < 101


def test_nothing_is_written_before_the_first_stage(run: RunDirectory) -> None:
    assert not run.root.exists()
    with run.lock():
        assert [path.name for path in run.root.iterdir()] == [".lock"]
    assert not run.root.exists()
    with run.lock(), run.stage("train", "a"):
        assert run.recipe() == recipe()
    assert sorted(path.name for path in run.root.iterdir()) == ["manifest.json", "recipe.yaml"]


@pytest.mark.parametrize("file", ["manifest_file", "metrics_file"])
def test_files_of_another_schema_are_refused(run: RunDirectory, file: str) -> None:
    path = getattr(run, file)
    read = run.manifest if file == "manifest_file" else run.metrics
    assert read()["schema"] == 1
    others: list[Any] = [{"schema": 2}, {}, []]
    for wrong in others:
        write_json(path, wrong)
        with pytest.raises(BadArtifact, match="this version reads 1"):
            read()


# --- whose folder it is -------------------------------------------------------------------------


def test_another_recipe_in_the_folder_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path)
    first.claim(recipe())
    first.keep_recipe()
    other = recipe(seed=3, train={"epochs": 9})
    with pytest.raises(BadRecipe) as caught:
        RunDirectory(tmp_path).claim(other)
    text = str(caught.value)
    assert "seed (0 there, 3 here)" in text
    assert "train.epochs (3.0 there, 9.0 here)" in text
    assert "model" not in text.replace("--update", "")
    assert "--update" in text
    RunDirectory(tmp_path).claim(recipe())
    updated = RunDirectory(tmp_path)
    updated.claim(other, update=True)
    assert updated.recipe() == recipe()
    updated.keep_recipe()
    assert updated.recipe() == other


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    directory = RunDirectory(tmp_path)
    with pytest.raises(BadRecipe, match="not empty and not a run directory"), directory.lock():
        directory.claim(recipe())
    assert content(tmp_path) == {"thesis.tex": "years of work"}


@pytest.mark.parametrize("left", [".lock", ".recipe.yaml.partial"])
def test_a_folder_left_by_a_run_killed_at_its_start_is_taken(tmp_path: Path, left: str) -> None:
    (tmp_path / left).touch()
    RunDirectory(tmp_path).claim(recipe())


def test_a_folder_without_a_recipe_is_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(BadArtifact, match=r"no recipe\.yaml"):
        RunDirectory(tmp_path).recipe()
    for broken in ("a: [", "- a"):
        (tmp_path / "recipe.yaml").write_text(broken)
        with pytest.raises((BadArtifact, BadRecipe), match=r"recipe\.yaml"):
            RunDirectory(tmp_path).recipe()


def _hold(root: Path, pipe: Any) -> None:
    with RunDirectory(root).lock():
        pipe.send("held")
        pipe.recv()


def test_a_second_process_is_refused_until_the_first_ends_or_dies(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_hold, args=(tmp_path, there))
    process.start()
    assert here.recv() == "held"
    with pytest.raises(BadRecipe, match="another run is at work"), RunDirectory(tmp_path).lock():
        pass
    assert (tmp_path / ".lock").exists()
    process.kill()
    process.join()
    with RunDirectory(tmp_path).lock():
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_deleted_while_it_was_waited_for_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock_after_deletion(file: Any, how: int) -> None:
        (tmp_path / ".lock").unlink()

    monkeypatch.setattr("fcntl.flock", flock_after_deletion)
    with pytest.raises(BadRecipe, match="another run is at work"), RunDirectory(tmp_path).lock():
        pass


# --- what a stage depends on --------------------------------------------------------------------

#: Setting -> the stages that it changes; everything else stays done.
CHANGES: list[tuple[dict[str, Any], set[str]]] = [
    ({"model": "other"}, {"sparsify", "train", "search", "dense", "dense+lora", "sparse+lora"}),
    ({"sparsify": {"ratio": 0.4}}, {"sparsify", "train", "search", "sparse+lora"}),
    ({"adapter": {"alpha": 32}}, {"train", "search", "dense+lora", "sparse+lora"}),
    ({"train": {"epochs": 1}}, {"train", "search", "dense+lora", "sparse+lora"}),
    ({"search": {"trials": 3}}, {"search"}),
    ({"evaluate": {"latency": True}}, set()),
    ({"baselines": ["dense"]}, set()),
]


@pytest.mark.parametrize(("change", "stages"), CHANGES)
def test_a_setting_changes_the_stages_that_depend_on_it(
    change: dict[str, Any], stages: set[str]
) -> None:
    names = ["sparsify", "train", "search", "dense", "dense+lora", "sparse+lora"]
    changed = {
        name
        for name in names
        if stage_inputs(recipe(**change), name, {}) != stage_inputs(recipe(), name, {})
    }
    assert changed == stages


def test_files_count_by_content_and_not_by_time(tmp_path: Path) -> None:
    data, model = tmp_path / "data.jsonl", tmp_path / "model"
    model.mkdir()
    data.write_text("one")
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(9_000_000))
    mine = recipe(model=str(model), task=str(data))
    first = source_hashes(mine, {})
    assert set(first) == {"model", "task", "report:data.jsonl"}
    os.utime(data, (1, 1))
    (model / "README.md").write_text("notes")
    assert source_hashes(mine, {}) == first
    data.write_text("two")
    second = source_hashes(mine, {})
    assert {key for key in first if first[key] != second[key]} == {"task", "report:data.jsonl"}
    with (model / "model.safetensors").open("r+b") as file:
        file.write(os.urandom(9_000_000))
    assert source_hashes(mine, {})["model"] != first["model"]
    assert stage_inputs(mine, "train", first) != stage_inputs(mine, "train", second)


def test_files_that_are_gone_count_as_they_were_recorded(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("one")
    mine = recipe(task=str(data))
    first = source_hashes(mine, {})
    data.unlink()
    assert source_hashes(mine, first) == first
    assert source_hashes(mine, {}) == {}


def test_hashes_of_sources_are_kept_in_the_manifest(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("one")
    mine = recipe(task=str(data))
    run = RunDirectory(tmp_path / "run")
    run.claim(mine)
    known = run.sources(mine)
    with run.stage("train", "a"):
        pass
    data.unlink()
    assert RunDirectory(run.root).sources(mine) == known != {}


def test_fingerprints_follow_values_and_not_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(1, 2) != fingerprint([1, 2])
    assert fingerprint(recipe()) == fingerprint(recipe()) != fingerprint(recipe(seed=1))


# --- metrics ------------------------------------------------------------------------------------


def test_metrics_are_replaced_whole_with_the_environment(run: RunDirectory) -> None:
    assert run.metrics()["rows"] == []
    run.set_metrics([{"name": "dense"}])
    assert RunDirectory(run.root).metrics()["rows"] == [{"name": "dense"}]
    facts = json.loads(run.metrics_file.read_text())["environment"]
    assert {"platform", "cpus", "threads", "torch", "transformers", "elastune"} <= facts.keys()


@pytest.mark.parametrize("task", ["gsm8k", "custom:hub:owner/name", "../../etc/x.jsonl"])
def test_prediction_files_stay_in_their_folder(run: RunDirectory, task: str) -> None:
    path = run.prediction_file("dense+lora", task)
    assert path.parent == run.predictions
    assert path.resolve().parent == run.predictions.resolve()


def test_the_recipe_in_the_folder_is_plain_yaml(run: RunDirectory) -> None:
    run.keep_recipe()
    assert yaml.safe_load(run.recipe_file.read_text())["model"] == "m"


def test_a_run_called_like_its_task_does_not_depend_on_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe({"model": "m", "task": "sst2"}, "recipe")
    before = source_hashes(recipe, {})
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "space.json").write_text("{}")
    (tmp_path / "c4").write_text("text")
    assert source_hashes(recipe, {}) == before
