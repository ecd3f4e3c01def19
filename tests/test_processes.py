"""Training in several processes, launched as users launch it: the weights of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_run import cli, save_recipe, save_sums, save_tiny_model, tiny_recipe

from elastune.artifacts import RunDirectory

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo between processes")

STRUCTURE: dict[str, Any] = {
    "ffn": [1.0, 0.5],
    "heads": [1.0, 0.5],
    "depth": [1],
    "round_to": 8,
    "calibration": {"source": "task", "n_sequences": 4, "length": 16},
}
ROUNDING = {"ranks": 1e-4, "structure": 1e-4, "sandwich": 1e-3, "eftnas": 1e-3}
"""Of sums in another order; Adam divides gradients that are almost nothing by what they are."""

KINDS: dict[str, dict[str, Any]] = {
    "ranks": {"baselines": ["sparse+lora"]},
    "structure": {"method": "lonas", "structure": STRUCTURE, "baselines": []},
    "sandwich": {
        "method": "lonas",
        "structure": STRUCTURE,
        "baselines": ["dense+full"],
        "train": {"sampler": "sandwich", "distill": {"teacher": "in_place"}},
    },
    # scores learnt by movement pruning, all weights, an outside teacher, a size trained alone
    "eftnas": {
        "method": "eftnas",
        "start": "dense+full",
        "importance": {
            "method": "movement",
            "movement": {"max_steps": 4, "warmup": [0.2, 0.6], "block_size": 4},
        },
        "adapter": {"ranks": []},
        "structure": {
            "generate": {"points": [1.0, 0.7, 0.4], "tolerance": 0.3},
            "round_to": 1,
            "budgets": [0.7],
            "budget_slack": 0.25,
            "allocation": "points",
        },
        "train": {"full_learning_rate": 1e-3},
        "search": {
            "algorithm": "hill_climb",
            "trials": 2,
            "objective": "loss",
            "cost": "block_macs",
        },
        "baselines": ["dense+full", "alone"],
    },
}


def recipe(folder: Path, **sections: Any) -> Path:
    model, data = save_tiny_model(folder / "model"), save_sums(folder / "data")
    # 40 examples: the last batch of an epoch has four of its six, two for each process
    train = {"max_steps": 6, "batch_size": 6, "accumulation": 2} | sections.pop("train", {})
    return save_recipe(folder / "tiny.yaml", tiny_recipe(model, data, train=train, **sections))


def launch(
    *arguments: str | Path, processes: int = 2, how: Sequence[str] = ("--multi_gpu",)
) -> subprocess.Popen[str]:
    """Start a command in several processes, as a user does."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *how]  # without GPUs: CPUs
    command += ["--num_machines", "1", "--num_processes", str(processes)]
    command += ["--main_process_port", "0"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "elastune"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def launched(*arguments: str | Path, processes: int = 2, code: int = 0, **how: Any) -> str:
    process = launch(*arguments, processes=processes, **how)
    try:
        _, errors = process.communicate(timeout=480)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, errors
    return errors


def trainings(run: Path) -> list[str]:
    """Return the folders of a run that hold trained weights."""
    found = run.rglob("trained.safetensors")
    return sorted(str(path.parent.relative_to(run)) for path in found)


def difference(one: Path, other: Path) -> float:
    """Return the largest difference of a trained weight, over the largest weight."""
    a, b = load_file(one / "trained.safetensors"), load_file(other / "trained.safetensors")
    assert a.keys() == b.keys()
    largest = max(float(tensor.abs().max()) for tensor in a.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a) / largest


def losses(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow) if k in ("eftnas", "sandwich") else k for k in KINDS],
)
def test_two_processes_train_the_weights_of_one(kind: str, tmp_path: Path) -> None:
    file = recipe(tmp_path, **KINDS[kind])
    launched("run", file, "--out", tmp_path / "two")
    cli("run", file, "--out", tmp_path / "one")
    check_same(tmp_path / "two", tmp_path / "one", ROUNDING[kind])


def check_same(run: Path, other: Path, rounding: float) -> None:
    """Compare all that two runs trained, step by step, and what they report."""
    assert trainings(run) == trainings(other) != []
    for training in trainings(run):
        assert difference(run / training, other / training) < rounding, training
        for a, b in zip(losses(run / training), losses(other / training), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert (a["tokens"], a.get("configs")) == (b["tokens"], b.get("configs"))
    one, two = RunDirectory(other), RunDirectory(run)
    assert two.manifest()["stages"].keys() == one.manifest()["stages"].keys()
    assert [r["name"] for r in two.metrics()["rows"]] == [r["name"] for r in one.metrics()["rows"]]


def begun(folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait for a training's first whole checkpoint."""
    deadline = time.monotonic() + 480
    while not list(folder.glob("checkpoint-*/complete")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.005)


def workers(launcher: int) -> dict[str, int]:
    """Return rank -> process of what a launcher started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().decode().split("\0")
        except (OSError, ValueError):
            continue
        ranks = [v.removeprefix("RANK=") for v in variables if v.startswith("RANK=")]
        if parent == launcher and ranks:
            found[ranks[0]] = int(folder.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("then", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_killed_process_is_reported_and_any_number_goes_on(then: int, tmp_path: Path) -> None:
    file = recipe(
        tmp_path, train={"max_steps": 60, "batch_size": 13, "learning_rate": 1e-3}, baselines=[]
    )
    process = launch("train", file, "--out", tmp_path / "run")
    try:
        begun(tmp_path / "run" / "supernet", process)
        os.kill(workers(process.pid)["1"], signal.SIGKILL)
        _, errors = process.communicate(timeout=480)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "another process of this training was lost" in errors
    assert "run the same command again: it goes on from the last checkpoint" in errors
    steps = len(losses(tmp_path / "run" / "supernet"))
    assert 2 <= steps < 60

    if then == 1:
        cli("train", file, "--out", tmp_path / "run")
    else:
        launched("train", file, "--out", tmp_path / "run", processes=then)
    cli("train", file, "--out", tmp_path / "whole")
    run, whole = tmp_path / "run" / "supernet", tmp_path / "whole" / "supernet"
    assert [row["step"] for row in losses(run)] == list(range(1, 61))
    for a, b in zip(losses(run), losses(whole), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4), a["step"]
    assert difference(run, whole) < 1e-3


LAUNCH = Path(__file__).resolve().parent.parent / "recipes" / "launch"
FSDP = ("--config_file", str(LAUNCH / "fsdp2.yaml"))


@pytest.mark.parametrize(
    "kind",
    [
        "ranks",
        "structure",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("sandwich", "eftnas")),
    ],
)
def test_a_base_in_shards_trains_the_weights_of_one_process(kind: str, tmp_path: Path) -> None:
    file = recipe(tmp_path, **KINDS[kind])
    launched("run", file, "--out", tmp_path / "two", how=FSDP)
    cli("run", file, "--out", tmp_path / "one")
    check_same(tmp_path / "two", tmp_path / "one", ROUNDING[kind])


SHARDED = """
import torch
from tiny_models import inputs_of, tiny_model, tiny_net
from elastune import processes
from elastune.shards import shard_frozen_
from elastune.space import SubnetConfig

processes.join()
whole, parts = tiny_net(tiny_model("llama")), tiny_net(tiny_model("llama"))
shard_frozen_(parts.model)
held = [p for p in parts.model.model.layers.parameters() if not p.requires_grad]
inputs = inputs_of(whole.model)
worst = 0.0
for place in range(3):  # from the largest to the smallest
    config = SubnetConfig({dim.name: dim.choices[place] for dim in whole.space.dims})
    for net in (whole, parts):
        net.activate(config)
        net.model(**inputs, labels=inputs["input_ids"]).loss.backward()
for a, b in zip(whole.adapters.values(), parts.adapters.values(), strict=True):
    worst = max(worst, float((a.lora_A.grad - b.lora_A.grad).abs().max()))
    worst = max(worst, float((a.lora_B.grad - b.lora_B.grad).abs().max()))
part = sum(p.to_local().numel() for p in held) / sum(p.numel() for p in held)
if processes.is_main():
    print("HELD", part, "WORST", worst, "MOVED", float(b.lora_A.grad.abs().max()) > 0)
processes.wait()
"""


def test_each_process_holds_half_of_the_base_and_gradients_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "sharded.py").write_text(SHARDED)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *("--standalone", str(tmp_path / "sharded.py")),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
        text=True,
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    _, part, _, worst, _, moved = done.stdout.split()
    assert float(part) == pytest.approx(0.5, abs=0.02)
    assert float(worst) < 1e-6
    assert moved == "True"


def test_one_process_where_several_were_asked_for_is_refused(tmp_path: Path) -> None:
    file = recipe(tmp_path, baselines=[])
    errors = launched("train", file, "--out", tmp_path / "run", how=["--cpu"], code=1)
    assert "accelerate launch --cpu starts one process" in errors
    assert "torchrun --nproc_per_node 2 -m elastune" in errors
    assert not (tmp_path / "run").exists()


def test_bad_input_ends_all_processes(tmp_path: Path) -> None:
    errors = launched("train", tmp_path / "none.yaml", code=1)
    assert errors.count("error: ") == 1


def test_what_all_processes_meet_is_said_once(tmp_path: Path) -> None:
    file = recipe(tmp_path, train={"learning_rate": 1e30}, baselines=[])
    errors = launched("train", file, "--out", tmp_path / "run", code=1)
    assert errors.count("error: ") == errors.count("the loss became") == 1
    assert "a lower train.learning_rate" in errors
