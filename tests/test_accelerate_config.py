"""The file that `accelerate config` writes is what `accelerate launch` starts a training by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from tiny_run import save_recipe, save_sums, save_tiny_model, tiny_recipe

#: What the questions of `accelerate config` end in for two GPUs of a machine; without GPUs
#: accelerate takes processors in their place.
ANSWERS: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",
    "mixed_precision": "no",
    "use_cpu": False,
    "debug": False,
    "num_processes": 2,
    "num_machines": 1,
    "machine_rank": 0,
    "main_process_port": 0,
    "rdzv_backend": "static",
    "same_network": True,
    "enable_cpu_affinity": False,
}


@pytest.mark.slow
def test_a_training_by_a_configuration_file_of_accelerate_is_that_of_two_processes(
    tmp_path: Path,
) -> None:
    ClusterConfig(**ANSWERS).to_yaml_file(str(tmp_path / "config.yaml"))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["num_processes"] == 2
    model, data = save_tiny_model(tmp_path / "model"), save_sums(tmp_path / "data")
    settings = {"max_steps": 2, "batch_size": 4, "accumulation": 1}
    recipe = save_recipe(
        tmp_path / "tiny.yaml", tiny_recipe(model, data, train=settings, baselines=[])
    )
    logs = {}
    for name, how in {
        "two": ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "config.yaml")],
        "one": [],
    }.items():
        command = [sys.executable, *how, "-m", "elastune", "train", str(recipe)]
        done = subprocess.run(
            [*command, "--out", str(tmp_path / name)],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            text=True,
            capture_output=True,
            timeout=480,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        log = (tmp_path / name / "supernet/train.jsonl").read_text().splitlines()
        logs[name] = [json.loads(line) for line in log]
    assert [row["configs"] for row in logs["two"]] == [row["configs"] for row in logs["one"]]
    for two, one in zip(logs["two"], logs["one"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
