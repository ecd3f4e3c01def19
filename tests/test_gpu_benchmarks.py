"""The benchmarks for a GPU run, at toy size on the CPU, and say what they say."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GPU = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"
TOY = ["--device", "cpu", "--blocks", "2", "--width", "128", "--vocabulary", "300"]
OPTIONS = {
    "sparsify": ["--sequences", "3", "--length", "32"],
    "train_step": ["--steps", "2", "--batch-size", "2", "--tokens", "24"],
    "latency": ["--prompt", "16", "--new", "2", "--repeats", "1"],
}
CHECKS = {
    "sparsify": {"wanda_zeros": 0.5, "sparsegpt_zeros": 0.5},
    "train_step": {},
    "latency": {},
}


def _run(name: str, *options: str, gpu: bool = True) -> dict[str, Any]:
    environment = os.environ | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    done = subprocess.run(
        [sys.executable, str(GPU / f"{name}.py"), *options],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_a_gpu_benchmark_gives_its_figures_at_toy_size_on_the_cpu(name: str) -> None:
    figures = _run(name, *TOY, *OPTIONS[name])["figures"]
    seconds = [value for key, value in figures.items() if key.endswith(("_s", "_ms", "_hours"))]
    assert seconds, figures
    assert all(math.isfinite(value) and value > 0 for value in seconds)
    for key, value in CHECKS[name].items():
        assert figures[key] == pytest.approx(value, abs=0.01)


def test_without_a_gpu_a_gpu_benchmark_says_so_and_ends_well() -> None:
    answer = _run("latency", gpu=False)
    assert answer["figures"] == {}
    assert "no GPU" in answer["skipped"]
