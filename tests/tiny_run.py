"""A whole Shears run at toy size: a random Llama on disk, sums as data, and the recipe for both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from click.testing import Result
from tiny_llama import tiny_llama, tiny_tokenizer
from typer.testing import CliRunner

from elastune.cli import app

ROWS = ["dense", "dense+lora", "sparse", "sparse+lora", "largest", "heuristic", "smallest", "best"]
STEPS = 6


def save_tiny_model(folder: Path) -> Path:
    """Save a random two-layer Llama and its tokenizer."""
    tokenizer = tiny_tokenizer()
    tiny_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_sums(folder: Path, n_train: int = 48, n_report: int = 6) -> Path:
    """Write train.jsonl and report.jsonl: sums that all differ."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": f"What is {a} + {b}?", "completion": f"The answer is {a + b}."}
        for a in range(1, 12)
        for b in range(12, 23)
    ]
    _write_rows(folder / "train.jsonl", rows[:n_train])
    _write_rows(folder / "report.jsonl", rows[n_train : n_train + n_report])
    return folder


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tiny_recipe(model: Path, data: Path, **sections: Any) -> dict[str, Any]:
    """Return a recipe of seconds; ``sections`` replace or, where both are mappings, extend it."""
    recipe: dict[str, Any] = {
        "model": str(model),
        "task": {
            "name": str(data / "train.jsonl"),
            "options": {"report": str(data / "report.jsonl"), "max_new_tokens": 6},
        },
        "data": {"n_validation": 8},
        "sparsify": {"calibration": {"n_sequences": 4, "length": 32}},
        "adapter": {"ranks": [8, 4, 2], "alpha": 16},
        "train": {
            "max_steps": STEPS,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "checkpoint_every": 2,
        },
        "search": {"trials": 5, "front": 0, "random": 0},
        "evaluate": {"macs_length": 16},
    }
    for name, value in sections.items():
        old = recipe.get(name)
        recipe[name] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
    return recipe


def save_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def cli(*arguments: str | Path, code: int = 0) -> Result:
    """Run the command line in this process, which has imported everything already."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def start_cli(*arguments: str | Path, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start the command line in a process of its own, one thread, no hub."""
    return subprocess.Popen(
        [sys.executable, "-m", "elastune", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
