"""The whole of Shears on a classification task: what every later method relies on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_finetune import classifier, save_labelled
from tiny_llama import tiny_tokenizer
from tiny_run import cli, save_recipe
from transformers import AutoModelForSequenceClassification, AutoTokenizer


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_extracted_classifier_gives_the_reported_predictions_in_plain_peft(
    family: str, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    classifier(family, tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = save_labelled(tmp_path / "data")
    recipe: dict[str, Any] = {
        "model": str(tmp_path / "model"),
        "task": {
            "name": f"classification:{data / 'train.jsonl'}",
            "options": {"report": str(data / "report.jsonl")},
        },
        "data": {"n_validation": 8},
        "sparsify": {"calibration": {"n_sequences": 4, "length": 16}},
        "adapter": {"ranks": [8, 4, 2], "alpha": 16},
        "train": {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-2},
        "search": {"trials": 4, "objective": "score"},
        "evaluate": {"macs_length": 16},
        "baselines": ["sparse", "sparse+lora", "dense+full"],
    }
    out = tmp_path / "run"
    stdout = cli("run", save_recipe(tmp_path / "r.yaml", recipe), "--out", out, "--json").stdout
    names = [row["name"] for row in json.loads(stdout)["rows"]]
    assert names == [
        *recipe["baselines"],
        "largest",
        "heuristic",
        "smallest",
        "best",
        "random-best",
    ]

    # Baselines load in stock libraries, too, and give what was reported of them.
    tuned = AutoModelForSequenceClassification.from_pretrained(out / "baselines/dense-full/model")
    assert tuned.config.id2label == {0: "no", 1: "yes"}
    base = AutoModelForSequenceClassification.from_pretrained(out / "base")
    adapter = PeftModel.from_pretrained(base, out / "baselines" / "sparse-lora" / "adapter")
    loaded = {"dense+full": tuned.eval(), "sparse+lora": adapter.eval()}

    loaded_tokenizer = AutoTokenizer.from_pretrained(out / "base")
    for name in ("heuristic", "smallest"):
        base = AutoModelForSequenceClassification.from_pretrained(out / "base")
        loaded[name] = PeftModel.from_pretrained(base, out / "subnets" / name).eval()
    for name, model in loaded.items():
        lines = (out / "predictions" / f"{name}.train.jsonl.jsonl").read_text().splitlines()
        assert len(lines) == 12
        for record in map(json.loads, lines):
            inputs = loaded_tokenizer(record["text"], return_tensors="pt")
            with torch.no_grad():
                logits = model(**inputs).logits[0]
            torch.testing.assert_close(logits, torch.tensor(record["logits"]), rtol=1e-3, atol=1e-3)
