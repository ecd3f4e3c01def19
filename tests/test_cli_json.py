"""`--json` of every command: one JSON object on the standard output, and nothing else there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import typer
from test_finetune import classifier, save_labelled
from test_push import Hub, hub  # noqa: F401  (a fixture)
from tiny_llama import tiny_tokenizer
from tiny_run import cli, save_recipe, save_sums, save_tiny_model, tiny_recipe

from elastune.cli import app

# PEFT's own, and the hub's own library
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

VISIBLE = sorted(
    name
    for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
    if not command.hidden
)

#: Command -> its arguments, and keys that its answer must have. In order: later ones use earlier.
CALLS: dict[str, tuple[list[str], set[str]]] = {
    "doctor": ([], {"packages", "exports", "tasks"}),
    "sparsify": (["RECIPE", "-o", "RUN"], {"zeros", "weights", "sparsity"}),
    "space": (["RECIPE", "-o", "RUN"], {"dims"}),
    "train": (["RECIPE", "-o", "RUN"], {"supernet"}),
    "search": (["RECIPE", "-o", "RUN"], {"best", "values", "missed"}),
    "run": (["RECIPE", "-o", "RUN"], {"report", "rows"}),
    "evaluate": (["RUN", "--only", "best"], {"report", "rows"}),
    "extract": (["RUN", "--config", "smallest"], {"subnets"}),
    "sweep": (["RUN", "--cost", "params", "--parts", "0.999"], {"sweep", "cost", "report"}),
    "report": (["RUN"], {"report", "rows"}),
    "runs": (["RUN"], {"runs"}),
    "export": (["RUN", "--format", "peft"], {"exports", "failed"}),
    "check": (["RUN/export/peft"], {"checks"}),
    "profile": (
        ["RUN/base", "--prompt-tokens", "4", "--new-tokens", "2", "--rounds", "1"],
        {"profiles", "plot"},
    ),
    "adapter": (
        ["RUN/subnets/largest", "--model", "RUN/base", "--rank", "4", "--out", "CUT"],
        {"adapter", "ranks", "energy"},
    ),
    "push": (["RUN/export/peft", "user/mine"], {"repo", "url", "files"}),
    "fit": (
        [
            *("--model", "ENCODER", "--task", "classification:LABELLED/train.jsonl"),
            *("--target", "block_macs<=0.7x", "--plan-only", "--out", "FIT"),
            *("--set", "task.options.report=LABELLED/report.jsonl", "--set", "train.max_steps=4"),
        ],
        {"recipe", "stages", "seconds"},
    ),
    "demo": (
        [
            *("--out", "RUN", "--set", "model=MODEL", "--set", "task=SUMS/train.jsonl"),
            *("--set", "task.options={report: SUMS/report.jsonl, max_new_tokens: 4}"),
        ],
        {"report", "rows"},
    ),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the capitals in CALLS stand for."""
    root = tmp_path_factory.mktemp("json")
    model, sums = save_tiny_model(root / "model"), save_sums(root / "sums")
    recipe = tiny_recipe(model, sums, train={"max_steps": 2}, baselines=["dense"])
    tokenizer = tiny_tokenizer()
    classifier("bert", tokenizer).save_pretrained(root / "encoder")
    tokenizer.save_pretrained(root / "encoder")
    return {
        "RECIPE": str(save_recipe(root / "tiny.yaml", recipe)),
        "RUN": str(root / "run"),
        "CUT": str(root / "cut"),
        "FIT": str(root / "fit"),
        "MODEL": str(model),
        "SUMS": str(sums),
        "ENCODER": str(root / "encoder"),
        "LABELLED": str(save_labelled(root / "labelled")),
    }


def filled(arguments: list[str], places: dict[str, str]) -> list[str]:
    for name, path in places.items():
        arguments = [text.replace(name, path) for text in arguments]
    return arguments


def test_no_command_is_left_out() -> None:
    assert sorted(CALLS) == VISIBLE


@pytest.mark.e2e
def test_every_command_prints_one_object_and_nothing_else(
    places: dict[str, str],
    hub: Hub,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    short = {"RUN": str(Path(places["RUN"]).with_name("demo"))}
    for name, (arguments, keys) in CALLS.items():
        mine = places | short if name == "demo" else places
        if name == "demo":
            arguments = [*arguments, *small_demo()]
        printed = cli(name, *filled(arguments, mine), "--json").stdout
        assert printed.count("\n") == 1, (name, printed)
        found: dict[str, Any] = json.loads(printed)
        assert keys <= found.keys(), (name, list(found))


def small_demo() -> list[str]:
    """The settings that make a demo as small as the tiny recipe."""
    settings = ["data.n_validation=8", "train.max_steps=2", "train.batch_size=4", "baselines=[]"]
    settings += ["sparsify.calibration={source: task, n_sequences: 4, length: 32}"]
    settings += ["adapter.ranks=[8, 4]", "search.trials=3", "search.random=0", "search.front=0"]
    settings += ["evaluate.macs_length=16", "task.limit=4"]
    return [part for setting in settings for part in ("--set", setting)]
