"""The examples run, and what they leave behind loads in stock libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_the_python_example_leaves_stock_peft_adapters_beside_a_sparse_base(tmp_path: Path) -> None:
    small = ["--steps", "2", "--batch-size", "2", "--n-report", "4", "--out", str(tmp_path)]
    command = [sys.executable, str(EXAMPLES / "shears_in_python.py"), *small]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "heuristic:" in done.stdout
    loads = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from transformers import AutoModelForCausalLM\n"
        "from peft import PeftModel\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/base')\n"
        "weight = base.model.layers[3].mlp.up_proj.weight\n"
        "model = PeftModel.from_pretrained(base, sys.argv[1] + '/heuristic')\n"
        "assert 'elastune' not in sys.modules\n"
        "print('zeros', float((weight == 0).float().mean()))\n"
    )
    fresh = [sys.executable, "-c", loads, str(tmp_path)]
    zeros = subprocess.run(fresh, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert zeros.split()[-2:] == ["zeros", "0.5"]
    config = json.loads((tmp_path / "heuristic" / "adapter_config.json").read_text())
    assert config["r"] == 24


@pytest.mark.slow
def test_the_elastic_base_example_leaves_smaller_models(tmp_path: Path) -> None:
    small = ["--steps", "1", "--batch-size", "2", "--n-report", "2", "--out", str(tmp_path)]
    command = [sys.executable, str(EXAMPLES / "lonas_in_python.py"), *small]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["largest", "heuristic", "budget-75"]
    assert all("134.5 M parameters" in line for line in lines if line.startswith("largest"))
    # Equal widths in all blocks: the heuristic is an ordinary Llama checkpoint.
    config = json.loads((tmp_path / "heuristic" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["intermediate_size"] == 1152
    assert config["num_attention_heads"] == 6


@pytest.mark.e2e
def test_the_fine_tuning_example_compares_two_systems(tmp_path: Path) -> None:
    folder = tmp_path / "glue" / "rte"
    folder.mkdir(parents=True)
    for split, n in (("train", 40), ("validation", 12)):
        rows = [
            {"sentence1": f"There are {i} {split} pens.", "sentence2": f"{i} pens.", "label": i % 2}
            for i in range(n)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
    small = ["--data-dir", str(tmp_path), "--n-train", "32", "--out", str(tmp_path / "out")]
    command = [sys.executable, str(EXAMPLES / "finetune_in_python.py"), *small]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    full, lora, compared = done.stdout.strip().splitlines()
    assert full.startswith("full: accuracy 0.")
    assert lora.endswith("(n = 12)")
    assert "95 % interval" in compared


@pytest.mark.e2e
def test_the_generated_space_example_leaves_models_of_the_sizes_asked_for(tmp_path: Path) -> None:
    small = ["--steps", "1", "--batch-size", "2", "--n-report", "2", "--rounds", "1"]
    command = [sys.executable, str(EXAMPLES / "eftnas_in_python.py"), *small]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], check=True, capture_output=True, text=True
    )
    lines = done.stdout.strip().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["macs-100", "macs-85", "macs-70"]
    macs = [float(line.split(" GMACs")[0].split()[-1]) for line in lines]
    assert [round(m / macs[0], 2) for m in macs] == pytest.approx([1.0, 0.85, 0.7], abs=0.02)
    assert (tmp_path / "macs-70" / "model.safetensors").exists()
