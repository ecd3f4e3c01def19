"""DeepSpeed's ZeRO for what trains: the weights of one process, and refusals of what differs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_processes import (
    KINDS,
    LAUNCH,
    ROUNDING,
    begun,
    check_same,
    difference,
    launch,
    launched,
    losses,
    recipe,
    workers,
)
from tiny_run import cli

from elastune.errors import BadRecipe
from elastune.sampling import RandomSampler, SandwichSampler
from elastune.space import ElasticDim, SearchSpace
from elastune.zero import check_zero

with_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
FULL: dict[str, Any] = {
    "method": "lonas",
    "structure": KINDS["structure"]["structure"],
    "adapter": {"ranks": []},
    "baselines": [],
}


def how(stage: int) -> list[str]:
    if stage == 1:
        return ["--use_deepspeed", "--zero_stage", "1"]
    return ["--config_file", str(LAUNCH / "zero2.yaml")]


@with_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kind"), [(1, "eftnas"), (2, "eftnas"), (2, "sandwich"), (2, "ranks")]
)
def test_optimizer_states_in_shards_train_the_weights_of_one_process(
    stage: int, kind: str, tmp_path: Path
) -> None:
    file = recipe(tmp_path, **KINDS[kind])
    launched("run", file, "--out", tmp_path / "two", how=how(stage))
    cli("run", file, "--out", tmp_path / "one")
    check_same(tmp_path / "two", tmp_path / "one", ROUNDING[kind])


SHARDED = """
import sys
import torch
from torch import nn
from elastune import processes
from elastune.zero import ZeroOptimizer

processes.join()
rank, count = processes.rank(), processes.count()

def network():
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(7, 13), nn.Linear(13, 5), nn.Linear(5, 3)])

def adamw(net):
    matrices = [p for p in net.parameters() if p.ndim == 2]
    biases = [p for p in net.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": []}, {"params": biases}]
    return torch.optim.AdamW(groups, lr=1e-2)

def loss_of(net, rows, width):
    hidden = torch.tanh(nn.functional.linear(rows, net[0].weight[:width], net[0].bias[:width]))
    hidden = nn.functional.linear(hidden, net[1].weight[:, :width], net[1].bias)
    return (net[2](torch.tanh(hidden)) ** 2).mean()

def train(net, optimizer, steps, zero):
    for step in steps:
        rows = torch.randn(6 * count, 7, generator=torch.Generator().manual_seed(step))
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        for width in (13, 5, 9):  # the draws of a step
            own = rows[rank::count] if zero else rows
            loss = loss_of(net, own, width)
            optimizer.backward(loss) if zero else loss.backward()
        if not zero:
            nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()

def sharded(net):
    return ZeroOptimizer(adamw(net), int(sys.argv[1]), 0.05)

def apart(found, expected):
    return max(float((a - b).detach().abs().max()) for a, b in zip(found, expected, strict=True))

plain, parts = network(), network()
one, zero = adamw(plain), sharded(parts)
train(plain, one, range(3), False)
train(parts, zero, range(3), True)
weights = apart(parts.parameters(), plain.parameters())
held = sum(v.numel() for s in zero.state.values() for v in s.values()) / 2
zero.gather()
found, expected = zero.state_dict(), one.state_dict()
zero.close()
states = 0.0
if processes.is_main():
    assert found["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        states = max(states, apart([found["state"][number][n] for n in state], state.values()))
        assert all(found["state"][number][n].shape == v.shape for n, v in state.items())
    for a, b in zip(found["param_groups"], expected["param_groups"], strict=True):
        assert all(a[name] == b[name] for name in ("params", "lr", "weight_decay"))
again = network()
again.load_state_dict(plain.state_dict())
other = sharded(again)
other.load_state_dict(expected)  # one process's checkpoint, in shards
train(plain, one, range(3, 6), False)
train(again, other, range(3, 6), True)
other.close()
assert all(not p._post_accumulate_grad_hooks for p in again.parameters())
if processes.is_main():
    size = sum(p.numel() for p in plain.parameters())
    print("FOUND", weights, states, apart(again.parameters(), plain.parameters()), held / size)
processes.wait()
"""


@with_deepspeed
@pytest.mark.parametrize("stage", [1, 2])
def test_states_in_shards_are_those_of_one_process_and_become_them_again(
    stage: int, tmp_path: Path
) -> None:
    (tmp_path / "sharded.py").write_text(SHARDED)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *("--standalone", str(tmp_path / "sharded.py"), str(stage)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = done.stdout.partition("FOUND")[2].split()
    weights, states, resumed, held = map(float, found)
    assert max(weights, states, resumed) < 1e-6
    assert held == pytest.approx(0.5, abs=0.05)


@with_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("then", [1, 3])
def test_a_killed_run_goes_on_with_another_number_of_shards_or_none(
    then: int, tmp_path: Path
) -> None:
    train = {
        "max_steps": 60,
        "batch_size": 13,
        "full_learning_rate": 1e-3,
        "update": "full",
        "sampler": "sandwich",
        "weight_decay": 0.1,
    }
    file = recipe(tmp_path, train=train, **FULL)
    process = launch("train", file, "--out", tmp_path / "run", how=how(2))
    try:
        begun(tmp_path / "run" / "supernet", process)
        os.kill(workers(process.pid)["1"], signal.SIGKILL)
        _, errors = process.communicate(timeout=480)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "another process of this training was lost" in errors
    steps = len(losses(tmp_path / "run" / "supernet"))
    assert 2 <= steps < 60

    if then == 1:
        cli("train", file, "--out", tmp_path / "run")
    else:
        launched("train", file, "--out", tmp_path / "run", processes=then, how=how(1))
    cli("train", file, "--out", tmp_path / "whole")
    run, whole = tmp_path / "run" / "supernet", tmp_path / "whole" / "supernet"
    for a, b in zip(losses(run), losses(whole), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4), a["step"]
    assert difference(run, whole) < 1e-3


def test_weights_in_shards_of_deepspeed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    settings = tmp_path / "zero.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(settings))
    file = recipe(tmp_path, baselines=[])
    for text, said in (
        (json.dumps({"zero_optimization": {"stage": 3}}), "ZeRO stage 3 was asked for"),
        ("{", f"no ZeRO stage can be read from {settings}"),
    ):
        settings.write_text(text)
        errors = " ".join(launched("train", file, "--out", tmp_path / "run", code=1).split())
        assert said in errors
        assert "--zero_stage 2" in errors
        assert not (tmp_path / "run").exists()


class _Has:
    """Stands for the version of DeepSpeed that is installed."""

    def __init__(self, version: str) -> None:
        self.version = version

    def __call__(self, name: str) -> str:
        assert name == "deepspeed"
        return self.version


SPACE = SearchSpace(
    [
        ElasticDim("layers.0.ffn", "ffn", (48, 24), ("m",)),
        ElasticDim("layers.1.depth", "depth", (1, 0), ("n",)),
    ]
)
WITHOUT_DEPTH = SearchSpace(SPACE.dims[:1])


def test_draws_that_may_leave_weights_without_gradient_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", _Has("0.19.8"))
    weights = [torch.nn.Parameter(torch.zeros(2))]
    with pytest.raises(BadRecipe, match=r"what layers.1.depth stands for.*\ntry: train.sampler"):
        check_zero(weights, SPACE, RandomSampler(SPACE, 0), "fp32")
    check_zero(weights, SPACE, SandwichSampler(SPACE, 0), "fp32")
    check_zero(weights, WITHOUT_DEPTH, RandomSampler(WITHOUT_DEPTH, 0), "bf16")
    check_zero(weights, None, object(), "auto")


def test_float16_other_weights_and_an_old_deepspeed_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", _Has("0.19.8"))
    weights = [torch.nn.Parameter(torch.zeros(2))]
    halves = [torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))]
    with pytest.raises(BadRecipe, match="these are bfloat16\ntry: dtype=float32"):
        check_zero([*weights, *halves], None, object(), "fp32")
    with pytest.raises(BadRecipe, match=r"train\.precision=fp16"):
        check_zero(weights, None, object(), "fp16")
    monkeypatch.setattr(importlib.metadata, "version", _Has("0.16.4"))
    with pytest.raises(BadRecipe, match=r"DeepSpeed 0\.16\.4 cannot"):
        check_zero(weights, None, object(), "fp32")
