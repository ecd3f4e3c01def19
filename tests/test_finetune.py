"""Plain fine-tuning and LoRA, the references of every method, on encoders and decoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import tiny_llama, tiny_tokenizer
from tiny_models import tiny_model
from tiny_run import cli, save_recipe
from torch import nn
from transformers import AutoModelForSequenceClassification

from elastune.config import TrainConfig
from elastune.evaluate import evaluate
from elastune.finetune import finetune
from elastune.heads import HEADS
from elastune.tasks import get_task
from elastune.trained import load_trained
from elastune.whole_model import WholeModel

WORDS = ["apples", "clips", "gallons", "friends", "bucket", "water", "answer"]


def save_labelled(folder: Path, n: int = 60) -> Path:
    """Write sentences whose label is whether "sold" stands in them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        words = [WORDS[(i + k * k) % len(WORDS)] for k in range(2 + i % 4)]
        if i % 2:
            words[i % len(words)] = "sold"
        rows.append({"text": f"{i} " + " ".join(words), "label": ["no", "yes"][i % 2]})
    cut = n - n // 5
    for name, part in (("train", rows[:cut]), ("report", rows[cut:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    return folder


def task_of(folder: Path) -> Any:
    return get_task(f"classification:{folder / 'train.jsonl'}", report=str(folder / "report.jsonl"))


def classifier(family: str, tokenizer: Any, **changes: Any) -> Any:
    return tiny_model(
        family,
        auto=AutoModelForSequenceClassification,
        vocab_size=len(tokenizer),
        num_labels=2,
        **({"initializer_range": 0.05} | changes),
    )


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SETTINGS = {"learning_rate": 5e-3, "full_learning_rate": 3e-3, "warmup": 0.0, "seed": 0}


@pytest.mark.parametrize("update", ["full", "lora"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_both_ways_learn_what_a_word_means(family: str, update: Any, tmp_path: Path) -> None:
    task = task_of(save_labelled(tmp_path / "data", n=150))
    tokenizer = tiny_tokenizer()
    model = classifier(family, tokenizer)
    cfg = TrainConfig(**SETTINGS, max_steps=90, batch_size=16, schedule="constant")
    before = evaluate(model, tokenizer, task, task.report_examples())
    finetune(
        model, tokenizer, task, task.train_examples(), cfg, folder=tmp_path / "out", update=update
    )
    after = evaluate(model, tokenizer, task, task.report_examples())
    assert after.metric == "accuracy"
    assert after.value > max(0.85, before.value)


def test_plain_fine_tuning_is_adamw_on_the_mean_loss(tmp_path: Path) -> None:
    task = task_of(save_labelled(tmp_path / "data", n=20))
    tokenizer = tiny_tokenizer()
    cfg = TrainConfig(
        **SETTINGS, max_steps=4, batch_size=16, schedule="constant", max_grad_norm=1.0
    )
    model = classifier("bert", tokenizer, **NO_DROPOUT)
    examples = task.train_examples()
    finetune(model, tokenizer, task, examples, cfg, folder=tmp_path / "out")
    log = (tmp_path / "out/train.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in log]

    other = classifier("bert", tokenizer, **NO_DROPOUT)
    optimizer = torch.optim.AdamW(other.parameters(), lr=3e-3, weight_decay=0.0)
    inputs = tokenizer([e.text for e in examples], padding=True, return_tensors="pt")
    labels = torch.tensor([int(e.label) for e in examples])
    expected = []
    for _ in range(4):
        loss = other(**inputs, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[-1] < losses[0]


def test_a_killed_fine_tuning_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(save_labelled(tmp_path / "data"))
    tokenizer = tiny_tokenizer()
    cfg = TrainConfig(**SETTINGS, epochs=3, batch_size=8, checkpoint_every=2)

    def run(folder: Path) -> Any:
        return finetune(
            classifier("bert", tokenizer),
            tokenizer,
            task,
            task.train_examples(),
            cfg,
            folder=folder,
        )

    whole = run(tmp_path / "whole").trained_state()
    head = HEADS["sequence-classification"]
    stock, calls = type(head).loss, []

    def dying(self: Any, model: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return stock(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(type(head), "loss", dying)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    resumed = run(tmp_path / "cut").trained_state()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    other = WholeModel(classifier("bert", tokenizer, initializer_range=0.3))
    load_trained(other, tmp_path / "cut")
    assert all(torch.equal(other.trained_state()[name], whole[name]) for name in whole)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_recipe_fine_tunes_scores_and_goes_on(family: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    classifier(family, tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = save_labelled(tmp_path / "data")
    recipe = save_recipe(
        tmp_path / "recipe.yaml",
        {
            "method": "finetune",
            "model": str(tmp_path / "model"),
            "task": {
                "name": f"classification:{data / 'train.jsonl'}",
                "options": {"report": str(data / "report.jsonl")},
            },
            "data": {"n_validation": 8},
            "adapter": {"ranks": [8]},
            "train": {"max_steps": 3, "batch_size": 4},
            "evaluate": {"macs_length": 16},
        },
    )
    out = tmp_path / "run"
    stdout = cli("run", recipe, "--out", out, "--json").stdout
    rows = {row["name"]: row for row in json.loads(stdout)["rows"]}
    assert list(rows) == ["dense", "dense+full", "dense+lora"]
    assert all(row["metric"] == "accuracy" and row["n"] == 12 for row in rows.values())
    assert rows["dense+lora"]["params"] > rows["dense+full"]["params"] == rows["dense"]["params"]
    seconds = json.loads((out / "manifest.json").read_text())["stages"]["dense+full"]["finished"]
    (out / "predictions" / "dense.train.jsonl.jsonl").unlink()
    again = cli("run", out, "--json").stdout
    assert {row["name"]: row["score"] for row in json.loads(again)["rows"]} == {
        name: row["score"] for name, row in rows.items()
    }
    stages = json.loads((out / "manifest.json").read_text())["stages"]
    assert stages["dense+full"]["finished"] == seconds


def test_report_tasks_that_need_another_head_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    classifier("bert", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = save_labelled(tmp_path / "data")
    name = f"classification:{data / 'train.jsonl'}"
    recipe = save_recipe(
        tmp_path / "recipe.yaml",
        {
            "method": "finetune",
            "model": str(tmp_path / "model"),
            "task": name,
            "evaluate": {"tasks": [f"perplexity:{data / 'train.jsonl'}"]},
        },
    )
    stderr = cli("run", recipe, "--out", tmp_path / "run", code=2).stderr
    assert "causal-lm head" in stderr
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_only_scored_needs_no_training_data(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tiny_llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "day.txt").write_text("It is a day like any other.\n" * 40)
    recipe = {
        "method": "finetune",
        "model": str(tmp_path / "model"),
        "task": {"name": f"perplexity:{tmp_path / 'day.txt'}", "options": {"window": 16}},
        "baselines": ["dense"],
        "evaluate": {"macs_length": 16},
    }
    path = save_recipe(tmp_path / "recipe.yaml", recipe)
    stdout = cli("run", path, "--out", tmp_path / "run", "--json").stdout
    (row,) = json.loads(stdout)["rows"]
    assert row["metric"] == "perplexity"
    assert row["score"] > 1
    recipe["baselines"] = ["dense", "dense+full"]
    path = save_recipe(tmp_path / "other.yaml", recipe)
    stderr = cli("run", path, "--out", tmp_path / "other", code=2).stderr
    assert "no training examples" in stderr
