"""LoNAS at toy size: from a recipe to models that are smaller, load elsewhere and were scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_finetune import classifier, save_labelled
from tiny_llama import tiny_tokenizer
from tiny_run import save_recipe, save_sums, save_tiny_model, tiny_recipe
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from elastune.cli import app
from elastune.evaluate import mean_loss
from elastune.files import read_json
from elastune.models import load_model
from elastune.space import SearchSpace, SubnetConfig
from elastune.tasks import get_task

STRUCTURE: dict[str, Any] = {
    "ffn": [1.0, 0.67, 0.34],
    "heads": [1.0, 0.5],
    "depth": [1],
    "round_to": 8,
    "budgets": [0.8, 0.6],
    "allocation": ["knapsack", "uniform"],
    "probes": 4,
    "calibration": {"source": "task", "n_sequences": 4, "length": 16},
}
BUDGETS = ["knapsack-80", "uniform-80", "knapsack-60", "uniform-60"]
ROWS = ["dense", "dense+lora", "largest", "heuristic", "smallest", "best", *BUDGETS]


def cli(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    model, data = save_tiny_model(folder / "model"), save_sums(folder / "data")
    recipe = tiny_recipe(model, data, method="lonas", structure=STRUCTURE)
    recipe["evaluate"]["latency"] = True
    save_recipe(folder / "lonas.yaml", recipe)
    return folder


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    cli("run", source / "lonas.yaml", "--out", out)
    return out


def rows(run: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in read_json(run / "metrics.json")["rows"]}


def test_every_system_is_reported_with_its_own_size_and_latency(run: Path) -> None:
    found = rows(run)
    assert list(found) == ROWS
    assert found["dense"]["params"] == found["dense+lora"]["params"] == found["largest"]["params"]
    assert found["smallest"]["params"] < found["heuristic"]["params"] < found["largest"]["params"]
    assert all(row["latency_ms"] > 0 for row in found.values())


def test_budgets_are_kept(run: Path) -> None:
    found = rows(run)
    space = SearchSpace.from_dict(read_json(run / "space.json"))
    for name in BUDGETS:
        config = SubnetConfig(found[name]["config"])
        space.check(config)
        assert found[name]["macs"] < found["largest"]["macs"]
    assert found["knapsack-60"]["macs"] <= found["knapsack-80"]["macs"]


@pytest.mark.parametrize("name", ["largest", "heuristic", "smallest", "knapsack-60"])
def test_what_is_saved_is_as_large_as_reported_and_scores_as_reported(
    name: str, run: Path, source: Path
) -> None:
    model, tokenizer = load_model(run / "subnets" / name)
    assert sum(p.numel() for p in model.parameters()) == rows(run)[name]["params"]
    data = source / "data"
    options = {"report": str(data / "report.jsonl"), "max_new_tokens": 6}
    task = get_task(str(data / "train.jsonl"), **options)
    examples = task.report_examples()
    found = mean_loss(model, tokenizer, examples).loss
    assert found == found
    lines = (run / "predictions" / f"{name}.train.jsonl.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    ids = tokenizer(record["prompt"], return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.startswith(record["text"]) or record["text"].startswith(text)


@pytest.mark.parametrize("name", ["largest", "knapsack-60"])
def test_the_card_of_a_sub_network_tells_its_figures(name: str, run: Path) -> None:
    text = (run / "subnets" / name / "README.md").read_text()
    assert f"| {name} |" in text.partition("## Figures")[2]


def test_a_sub_network_can_be_written_again_in_another_format(run: Path) -> None:
    cli("extract", run, "--config", "best", "--format", "hf-padded")
    config = read_json(run / "subnets" / "best" / "config.json")
    assert config["model_type"] == "llama"
    cli("extract", run, "--config", "best", "--uniform")
    assert read_json(run / "subnets" / "best-uniform" / "config.json")["model_type"] == "llama"
    refused = cli("extract", run, "--config", "best", "--format", "gguf", code=2)
    assert "known are auto, hf" in " ".join(refused.output.split())


def test_a_run_that_is_done_does_nothing_again(run: Path, source: Path) -> None:
    before = (run / "manifest.json").read_text()
    cli("run", source / "lonas.yaml", "--out", run)
    stages = json.loads(before)["stages"]
    again = read_json(run / "manifest.json")["stages"]
    assert {n: s for n, s in again.items() if n != "extract/best"} == {
        n: s
        for n, s in stages.items()
        if n != "extract/best"  # written in another format above
    }


def test_full_weights_train_without_any_adapter(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = ["adapter.ranks=[]", "train.update=full", "train.sampler=sandwich"]
    changes += ["train.distill=in_place", "baselines=[dense+full]", "structure.budgets=[0.8]"]
    changes += ["train.max_steps=2", "search.trials=0"]
    arguments = [part for change in changes for part in ("--set", change)]
    cli("run", source / "lonas.yaml", "--out", out, *arguments)
    found = rows(out)
    assert list(found) == [
        *("dense+full", "largest", "heuristic", "smallest"),
        *("knapsack-80", "uniform-80"),
    ]
    assert (out / "subnets" / "smallest" / "config.json").exists()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_an_unmerged_adapter_comes_beside_its_base(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = ["structure.merge=false", "sparsify.ratio=0.5", "structure.budgets=[]"]
    changes += ["sparsify.calibration={source: task, n_sequences: 4, length: 16}"]
    changes += ["train.max_steps=2", "search.trials=0", "baselines=[sparse]"]
    arguments = [part for change in changes for part in ("--set", change)]
    cli("run", source / "lonas.yaml", "--out", out, *arguments)
    found = rows(out)
    assert found["largest"]["nonzero"] < found["largest"]["params"]
    assert list((out / "subnets" / "heuristic").rglob("adapter_config.json"))


REFUSED = {
    "structure.heads=[3]": "multiples of 2",
    "structure.ffn=[1.0, 4000]": "48 channels, not 4000",
    "structure.depth=[9]": "blocks are 0 to 1",
    "structure.budgets=[1.5]": "structure.budgets",
    "structure.budgets=[0.05]": "the smallest sub-network has 0.",
    "structure.order=best": "structure.order",
    "structure={}": "nothing is elastic",
    "structure=null": "needs a section 'structure'",
    "adapter.ranks=[]": "train.update=full",
    "train.distill=in_place": "train.sampler=sandwich",
}


def test_budgets_below_what_equal_cuts_reach_are_refused_before_training(
    source: Path, tmp_path: Path
) -> None:
    # Leaving a block out would be enough, but equal cuts leave none out.
    changes = ["structure.ffn=[1.0, 0.9]", "structure.heads=null", "structure.budgets=[0.6]"]
    arguments = [part for change in changes for part in ("--set", change)]
    result = cli("run", source / "lonas.yaml", "--out", tmp_path / "run", *arguments, code=2)
    assert "0.6 cannot be met" in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(
    change: str, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = cli("run", source / "lonas.yaml", "--out", out, "--set", change, code=2)
    assert REFUSED[change] in " ".join(result.output.split())
    assert not out.exists()


def test_an_encoder_with_its_own_head_leaves_smaller_classifiers(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    classifier("bert", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = save_labelled(tmp_path / "data")
    recipe: dict[str, Any] = {
        "method": "lonas",
        "model": str(tmp_path / "model"),
        "task": {
            "name": f"classification:{data / 'train.jsonl'}",
            "options": {"report": str(data / "report.jsonl")},
        },
        "data": {"n_validation": 8},
        "structure": STRUCTURE | {"depth": None, "shared": True, "heads": None, "budgets": []},
        "adapter": {"ranks": [8, 4, 2], "targets": ["q", "v"], "alpha": 16},
        "train": {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-2},
        "search": {"trials": 4, "objective": "score"},
        "evaluate": {"macs_length": 16},
    }
    out = tmp_path / "run"
    cli("run", save_recipe(tmp_path / "r.yaml", recipe), "--out", out)
    # One width for all blocks: what is saved is an ordinary checkpoint.
    plain = AutoModelForSequenceClassification.from_pretrained(out / "subnets/smallest").eval()
    assert plain.config.intermediate_size == 16
    loaded_tokenizer = AutoTokenizer.from_pretrained(out / "subnets/smallest")
    lines = (out / "predictions" / "smallest.train.jsonl.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        inputs = loaded_tokenizer(record["text"], return_tensors="pt")
        with torch.no_grad():
            logits = plain(**inputs).logits[0]
        torch.testing.assert_close(logits, torch.tensor(record["logits"]), rtol=1e-3, atol=1e-3)
