"""The whole pipeline on the real SmolLM2-135M, and its result in plain transformers and peft."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import ROWS, start_cli

pytestmark = pytest.mark.e2e

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "smoke.yaml"

#: Runs in a process that knows nothing of this library.
GENERATE = """
import sys, warnings
warnings.filterwarnings("ignore")
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("base")
model = AutoModelForCausalLM.from_pretrained("base")
model = PeftModel.from_pretrained(model, "subnets/best")
ids = tokenizer("Question: What is 7 + 5?\\nAnswer:", return_tensors="pt")
out = model.generate(**ids, max_new_tokens=4, do_sample=False)
assert "elastune" not in sys.modules
print(tokenizer.decode(out[0], skip_special_tokens=True))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smoke") / "run"
    process = start_cli("run", RECIPE, "--out", out)
    _, progress = process.communicate()
    assert process.returncode == 0, progress
    return out


def test_all_rows_are_measured(run: Path) -> None:
    rows = {row["name"]: row for row in json.loads((run / "metrics.json").read_text())["rows"]}
    compared = [name for name in rows if name == "random-best" or name.startswith("front-")]
    assert [name for name in rows if name not in compared] == ROWS
    assert compared[0] == "random-best"
    for row in rows.values():
        assert 0 <= row["score"] <= 1
        assert row["n"] == 8
    # The parameters that the model's authors state, and half of those in the blocks' linears.
    assert rows["dense"]["params"] == 134_515_008
    in_blocks = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert rows["dense"]["nonzero"] - rows["sparse"]["nonzero"] == pytest.approx(
        in_blocks / 2, rel=0.01
    )
    assert rows["largest"]["params"] > rows["heuristic"]["params"] > rows["smallest"]["params"]


def test_exactly_half_of_every_row_of_every_linear_is_zero(run: Path) -> None:
    report = json.loads((run / "base" / "sparsity.json").read_text())
    assert report["total"]["sparsity"] == 0.5
    weights = load_file(run / "base" / "model.safetensors")
    assert len(report["tensors"]) == 30 * 7
    for name in report["tensors"]:
        zeros = (weights[name] == 0).sum(dim=1)
        assert torch.all(zeros == weights[name].shape[1] // 2), name


def test_plain_peft_generates_with_the_best_sub_network(run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GENERATE], cwd=run, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Question: What is 7 + 5?")


def test_the_report_shows_every_system(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    for name in ROWS:
        assert name in page
