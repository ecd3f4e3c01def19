"""Recipes whose base is made block by block: the same base as in memory, and what is refused."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import cli, save_recipe, save_sums, save_tiny_model, start_cli, tiny_recipe

from elastune.config import load_recipe
from elastune.errors import BadRecipe
from elastune.files import read_json
from elastune.models import load_model

SORTED: dict[str, Any] = {
    "method": "lonas",
    "structure": {
        "ffn": [1.0, 0.5],
        "round_to": 8,
        "calibration": {"n_sequences": 4, "length": 32},
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streamed")
    save_tiny_model(folder / "model")
    save_sums(folder / "data")
    return folder


def made(place: Path, name: str, stream: bool, **sections: Any) -> Path:
    sparsify = sections.pop("sparsify", {}) | {"stream": stream}
    recipe = tiny_recipe(place / "model", place / "data", sparsify=sparsify, **sections)
    cli("sparsify", save_recipe(place / f"{name}.yaml", recipe), "--out", place / name)
    return place / name


def same_base(first: Path, second: Path) -> None:
    one, other = (load_model(run / "base")[0].state_dict() for run in (first, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_json(first / "base" / "sparsity.json") == read_json(
        second / "base" / "sparsity.json"
    )


def test_a_streamed_run_has_the_base_of_one_in_memory(place: Path) -> None:
    streamed = made(place, "streamed", True)
    same_base(streamed, made(place, "memory", False))
    files = {file.name for file in (streamed / "base").iterdir()}
    assert "model.safetensors.index.json" in files
    assert not [name for name in files if name.startswith((".", "shard"))]
    # The stage is done for either way of making it.
    cli("sparsify", streamed, "--set", "sparsify.stream=false", "--update")
    assert "model.safetensors.index.json" in {f.name for f in (streamed / "base").iterdir()}


@pytest.mark.parametrize("order", ["wanda", pytest.param("taylor", marks=pytest.mark.slow)])
def test_a_streamed_base_is_sorted_after_it_is_sparse(place: Path, order: str) -> None:
    sections = {**SORTED, "structure": SORTED["structure"] | {"order": order}}
    sparse = {"ratio": 0.25}
    streamed = made(place, f"sorted-{order}", True, sparsify=sparse, **sections)
    same_base(
        streamed, made(place, f"sorted-{order}-in-memory", False, sparsify=sparse, **sections)
    )
    assert "unsorted" not in {file.name for file in (streamed / "base").iterdir()}


def test_auto_streams_where_the_weights_take_half_of_the_free_memory(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = save_recipe(
        place / "auto.yaml", tiny_recipe(place / "model", place / "data", sparsify={"ratio": 0.5})
    )
    cli("sparsify", recipe, "--out", place / "roomy")
    assert not list((place / "roomy" / "base").glob("*.index.json"))
    size = sum(p.numel() * 4 for p in load_model(place / "model")[0].parameters())

    class Memory:
        available = int(1.9 * size)

    monkeypatch.setattr("elastune.run.psutil.virtual_memory", Memory)
    cli("sparsify", recipe, "--out", place / "tight")
    same_base(place / "tight", place / "roomy")
    assert list((place / "tight" / "base").glob("*.index.json"))


@pytest.mark.slow
def test_a_killed_streamed_stage_leaves_nothing_and_is_made_again(place: Path) -> None:
    recipe = tiny_recipe(place / "model", place / "data", sparsify={"stream": True})
    path = save_recipe(place / "killed.yaml", recipe)
    run = place / "killed"
    process = start_cli("sparsify", path, "--out", run)
    while process.poll() is None and not list(run.glob(".base.*/shard-*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (run / "base").exists()
    cli("sparsify", path, "--out", run)
    same_base(run, made(place, "never-killed", False))
    assert not list(run.glob(".base.*"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"vocabulary": "task"}, "vocabulary=task needs the base in memory whole"),
        ({"method": "sqft", "adapter": {"keep": "int4"}}, "an INT4 grid needs the base"),
        ({"start": "dense+full", "baselines": ["dense+full"]}, r"start=dense\+full needs"),
    ],
)
def test_what_needs_the_base_whole_is_refused_with_streaming(
    place: Path, sections: dict[str, Any], message: str
) -> None:
    recipe = tiny_recipe(place / "model", place / "data", sparsify={"stream": True}, **sections)
    path = save_recipe(place / "refused.yaml", recipe)
    with pytest.raises(BadRecipe, match=message):
        load_recipe(path)
    recipe["sparsify"]["stream"] = "auto"
    assert load_recipe(save_recipe(path, recipe)).unstreamed is not None
