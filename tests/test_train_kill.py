"""A training process that is killed outright, and run again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tiny_models import encoded, tiny_model, tiny_net

from elastune.config import TrainConfig
from elastune.sampling import RandomSampler
from elastune.train import train

STEPS, KILLED_AT = 14, 7  # checkpoints at 3, 6, ...: the kill costs at least one step

PROGRAM = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
from test_train_kill import fit
fit(pathlib.Path(sys.argv[2]), seconds_per_step=float(sys.argv[3]))
"""


def fit(folder: Path, *, seconds_per_step: float = 0.0) -> None:
    """Train a tiny model with dropout, as slowly as asked for."""
    torch.set_num_threads(1)
    net = tiny_net(tiny_model("llama"), dropout=0.2)
    cfg = TrainConfig(max_steps=STEPS, batch_size=2, accumulation=2, checkpoint_every=3, seed=0)

    def wait(done: int, total: int, facts: Any) -> None:
        time.sleep(seconds_per_step)

    examples = encoded(9, 12, 5, 14, 7, 11, 6, 8, 10, n_prompt=3)
    train(net, examples, RandomSampler(net.space, 3), cfg, folder=folder, progress=wait)


def start(folder: Path, seconds_per_step: float) -> subprocess.Popen[str]:
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", PROGRAM, here, str(folder), str(seconds_per_step)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def steps_logged(folder: Path) -> list[int]:
    path = folder / "train.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def test_a_killed_run_started_again_writes_the_same_file(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    with start(broken, 0.25) as process:
        deadline = time.monotonic() + 120
        while len(steps_logged(broken)) < KILLED_AT and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
        _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors[-2000:]
    assert KILLED_AT <= len(steps_logged(broken)) < STEPS
    assert not (broken / "trained.safetensors").exists()
    assert list(broken.glob("checkpoint-*/complete"))

    fit(broken)
    fit(tmp_path / "whole")
    assert steps_logged(broken) == list(range(1, STEPS + 1))
    names = sorted(path.name for path in broken.iterdir())
    assert names == ["train.jsonl", "trained.safetensors"]
    found = (broken / "trained.safetensors").read_bytes()
    assert found == (tmp_path / "whole" / "trained.safetensors").read_bytes()
