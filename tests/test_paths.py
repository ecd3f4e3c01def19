"""Names and links in files never lead a command outside of the folder that it writes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from fuzzing import snapshot
from tiny_llama import tiny_llama, tiny_tokenizer
from tiny_run import cli, save_recipe, save_sums, save_tiny_model, tiny_recipe

from elastune.artifacts import RunDirectory
from elastune.config import make_recipe
from elastune.errors import BadArtifact
from elastune.export.recorded import refuse_changed, refuse_missing
from elastune.files import (
    refuse_links_outside,
    refuse_outside,
    remove,
    whole_folder,
    write_text,
)
from elastune.models import load_model
from elastune.push import complete_export
from elastune.tokenizer_file import rebuilt, tokenizer_data

OUTSIDE = ("../x", "/etc/passwd", "a/../../b", "..", "\0", "", 3, None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a trained super-network and two trials."""
    home = tmp_path_factory.mktemp("home")
    recipe = tiny_recipe(save_tiny_model(home / "model"), save_sums(home / "data"))
    recipe |= {"search": {"trials": 2, "front": 0, "random": 0}, "train": recipe["train"]}
    recipe["train"] = recipe["train"] | {"max_steps": 2}
    path = save_recipe(home / "recipe.yaml", recipe | {"baselines": []})
    cli("train", path, "--out", home / "run")
    cli("search", path, "--out", home / "run")
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "run", tmp_path / "run", symlinks=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("ten years")
    return tmp_path


def test_names_of_files_that_lead_out_of_a_folder_are_refused(tmp_path: Path) -> None:
    for name in OUTSIDE:
        with pytest.raises(BadArtifact, match="no name of a file"):
            refuse_outside(tmp_path, [name])
    refuse_outside(tmp_path, ["a", "a/b.c", "..a", "a..", ".hidden"])


@pytest.mark.parametrize("name", ["../../precious", "/tmp/elastune-escapes", "..", "a/b", ".x", ""])
def test_a_subnetwork_of_such_a_name_is_never_written(home: Path, name: str) -> None:
    space = json.loads((home / "run" / "space.json").read_text())
    config = {dim["name"]: dim["choices"][0] for dim in space["dims"]}
    manifest = json.loads((home / "run" / "manifest.json").read_text())
    manifest["stages"]["targets"] = {
        **manifest["stages"]["train"],
        "outputs": ["search/targets.json"],
    }
    targets = {"schema": 1, "subnets": {name: {"config": config, "limits": [], "searched": 0}}}
    (home / "run" / "search" / "targets.json").write_text(json.dumps(targets))
    (home / "run" / "manifest.json").write_text(json.dumps(manifest))
    before = snapshot(home, home / "run")
    for command in (["extract"], ["export", "--format", "peft"], ["evaluate"]):
        said = cli(command[0], home / "run", *command[1:], code=2).output
        assert "no name of a folder" in said
    assert snapshot(home, home / "run") == before
    assert not Path("/tmp/elastune-escapes").exists()


@pytest.mark.parametrize("link", [".lock", "search", "subnets", "metrics.json", "space.json"])
def test_a_run_with_a_link_out_of_it_is_not_written_through_it(home: Path, link: str) -> None:
    place = home / "run" / link
    remove(place)
    outside = home / "precious" / ("" if link in ("search", "subnets") else "thesis.txt")
    place.symlink_to(outside)
    before = snapshot(home)
    for command in ("run", "extract", "search", "evaluate"):
        assert "is a link to" in cli(command, home / "run", code=2).output
    assert snapshot(home) == before


def test_a_link_within_a_run_is_no_matter(home: Path) -> None:
    (home / "run" / "shortcut").symlink_to("search/trials.json")
    refuse_links_outside(home / "run")


def test_a_lock_that_became_a_link_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.txt").write_text("ten years")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "thesis.txt")
    monkeypatch.setattr("elastune.artifacts.refuse_links_outside", lambda folder: None)
    with pytest.raises(OSError), RunDirectory(tmp_path / "run").lock():
        pass
    assert (tmp_path / "thesis.txt").read_text() == "ten years"


def test_files_are_never_written_or_removed_through_links(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a.txt").write_text("old")
    before = snapshot(tmp_path / "kept")
    (tmp_path / ".b.txt.partial").symlink_to(tmp_path / "kept" / "a.txt")
    write_text(tmp_path / "b.txt", "new")
    assert (tmp_path / "b.txt").read_text() == "new"
    assert not (tmp_path / "b.txt").is_symlink()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    remove(tmp_path / "link")
    (tmp_path / "out").symlink_to(tmp_path / "kept")
    with whole_folder(tmp_path / "out") as partial:
        (partial / "mine").touch()
    assert not (tmp_path / "out").is_symlink()
    assert os.listdir(tmp_path / "out") == ["mine"]
    assert snapshot(tmp_path / "kept") == before
    assert sorted(os.listdir(tmp_path)) == ["b.txt", "kept", "out"]


@pytest.mark.parametrize("name", ["*", "config", "[a-z]*", "?"])
def test_making_a_folder_whole_deletes_no_hidden_neighbour(tmp_path: Path, name: str) -> None:
    for neighbour in (".config.d", ".c.d", f".{name}.old", ".ab.c"):
        (tmp_path / neighbour).mkdir()
        (tmp_path / neighbour / "mine").touch()
    before = snapshot(tmp_path)
    with whole_folder(tmp_path / name):
        pass
    assert snapshot(tmp_path, tmp_path / name) == before


def test_a_recipe_called_like_the_parent_folder_runs_below_runs(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained / "recipe.yaml", tmp_path / "...yaml")
    before = snapshot(tmp_path)
    cli("space", "...yaml", "--set", "sparsify.ratio=0.0")
    assert snapshot(tmp_path, tmp_path / "runs") == before


def test_prediction_files_of_any_task_lie_in_their_folder(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for task in ("../../x", "/etc/passwd", "custom:hub:../..", "a/b:c", ".."):
        recipe = make_recipe({"model": "m", "task": task}, "recipe")
        file = run.prediction_file("best", recipe.task.label)
        assert file.parent == tmp_path / "predictions"


def test_an_index_of_shards_reads_no_file_outside_of_its_folder(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    secret = tmp_path / "secret.safetensors"
    (folder / "model.safetensors").rename(secret)
    names = list(tiny_llama(tiny_tokenizer()).state_dict())
    for place in ("../secret.safetensors", str(secret)):
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, place)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(BadArtifact, match="no name of a file"):
            load_model(folder)


def test_records_of_exports_name_no_file_outside(tmp_path: Path) -> None:
    for name in ("../x", "/etc/passwd"):
        with pytest.raises(BadArtifact, match="no name of a file"):
            refuse_missing(tmp_path, [name])
        with pytest.raises(BadArtifact, match="no name of a file"):
            refuse_changed(tmp_path, {name: "0" * 64}, said="then")


def test_a_push_takes_nothing_along_that_a_link_leads_to(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    (folder / "README.md").write_text("mine")
    assert "config.json" in complete_export(folder)
    (tmp_path / "id_rsa").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(BadArtifact, match="is a link to"):
        complete_export(folder)


def test_folders_of_the_hubs_cache_are_links_and_are_taken(tmp_path: Path) -> None:
    blobs, snapshots = tmp_path / "blobs", tmp_path / "snapshots" / "c0ffee"
    blobs.mkdir()
    snapshots.mkdir(parents=True)
    (blobs / "1").write_text("{}")
    (snapshots / "config.json").symlink_to("../../blobs/1")
    refuse_links_outside(snapshots)
    (snapshots / "other").symlink_to("../../../elsewhere")
    with pytest.raises(BadArtifact):
        refuse_links_outside(snapshots)


def test_a_cut_adapter_replaces_no_folder_that_is_none(tmp_path: Path) -> None:
    adapter = tmp_path / "home" / "lora"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    before = snapshot(tmp_path)
    said = cli("adapter", adapter, "--out", tmp_path / "home", "--model", "nowhere/at-all", code=2)
    assert "is not replaced" in said.output
    assert snapshot(tmp_path) == before


def test_templates_of_any_name_in_a_tokenizer_are_written_nowhere_else(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    names = ("default", "../../../escaped", "/tmp/elastune-escapes")
    settings["chat_template"] = [{"name": n, "template": "{{ messages }}"} for n in names]
    file.write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    before = snapshot(tmp_path, tmp_path / "out")
    _, tokenizer = load_model(folder)
    made = rebuilt(tokenizer, tokenizer_data(tokenizer))
    assert made.chat_template == tokenizer.chat_template
    assert snapshot(tmp_path, tmp_path / "out") == before
    assert not Path("/tmp/elastune-escapes.jinja").exists()
