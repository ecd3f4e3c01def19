"""Training: gradients, the log, the schedule, and stock PEFT as the oracle."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import encoded, tiny_model, tiny_net
from torch import Tensor, nn

import elastune.train
from elastune.config import TrainConfig
from elastune.errors import BadArtifact
from elastune.run import only_largest
from elastune.sampling import RandomSampler, SandwichSampler
from elastune.sparsify import Sparsity, sparsify_
from elastune.supernet import SuperNetwork
from elastune.train import TrainResult, load_trained, train

EXAMPLES = encoded(9, 12, 5, 14, 7, 11, 6, 8, n_prompt=3)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def settings(**changes: Any) -> TrainConfig:
    plain = {"max_steps": 4, "batch_size": 2, "learning_rate": 1e-2, "max_grad_norm": 1.0}
    return TrainConfig(**(plain | {"seed": 0} | changes))


def fit(net: SuperNetwork, folder: Path, sampler: Any = None, **changes: Any) -> TrainResult:
    sampler = sampler or RandomSampler(net.space, seed=3)
    return train(net, EXAMPLES, sampler, settings(**changes), folder=folder)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def spy(monkeypatch: pytest.MonkeyPatch, see: Callable[[Any, Any], None]) -> None:
    """Call ``see(model, batch)`` with each forward pass of the training."""
    stock = elastune.train.completion_loss

    def watched(model: Any, batch: Any) -> tuple[Tensor, int]:
        see(model, batch)
        return stock(model, batch)

    monkeypatch.setattr(elastune.train, "completion_loss", watched)


def record_gradients(net: SuperNetwork) -> list[Tensor]:
    found: list[Tensor] = []
    for adapter in net.adapters.values():
        for parameter in (adapter.lora_A, adapter.lora_B):
            parameter.register_hook(lambda grad: found.append(grad.clone()))
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradient_checkpointing_changes_no_gradient(family: str, tmp_path: Path) -> None:
    found, draws = [], []
    for checkpointing in (False, True):
        net = tiny_net(tiny_model(family), ranks=(8, 4, 2, 0))
        gradients = record_gradients(net)
        folder = tmp_path / str(checkpointing)
        fit(
            net,
            folder,
            gradient_checkpointing=checkpointing,
            accumulation=2,
            draw_per="micro_batch",
            learning_rate=1e-12,  # the weights stay put, so that every gradient is comparable
        )
        found.append(sorted((float(g.norm()), g) for g in gradients if g.any()))
        draws.append([row["configs"] for row in rows(folder)])
    assert draws[0] == draws[1]
    assert len({str(d) for d in draws[0]}) > 1
    assert len(found[0]) == len(found[1]) > 50
    for (size, plain), (_, recomputed) in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6 * size, rtol=1e-6)


@pytest.mark.parametrize("draw_per", ["step", "micro_batch"])
def test_the_log_names_exactly_what_was_active(
    draw_per: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = tiny_net(tiny_model("llama"))
    active: list[list[int]] = []

    def see(model: Any, batch: Any) -> None:
        # Read off the modules themselves, in the order of the dims.
        sizes = [{net.adapters[m].active_rank for m in dim.modules} for dim in net.space.dims]
        assert all(len(size) == 1 for size in sizes)
        ranks = [size.pop() for size in sizes]
        active.append([d.choices.index(r) for d, r in zip(net.space.dims, ranks, strict=True)])

    spy(monkeypatch, see)
    fit(net, tmp_path, accumulation=2, draw_per=draw_per)
    logged = [row["configs"] for row in rows(tmp_path)]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    per_step = [active[i : i + 2] for i in range(0, 8, 2)]
    if draw_per == "step":
        assert all(first == second for first, second in per_step)
        assert logged == [[first] for first, _ in per_step]
    else:
        assert logged == per_step
        assert len({str(draw) for draw in active}) == 8
    assert net.config == net.space.largest()


def test_a_sandwich_trains_three_sub_networks_a_step(tmp_path: Path) -> None:
    net = tiny_net(tiny_model("llama"))
    result = fit(net, tmp_path, SandwichSampler(net.space, seed=0))
    for row in rows(tmp_path):
        assert len(row["configs"]) == 3
        assert row["configs"][0] == [0] * 6
        assert row["configs"][2] == [2] * 6
    assert result.tokens == sum(row["tokens"] for row in rows(tmp_path))


def test_the_sandwich_gradient_is_the_weighted_sum_of_its_parts(tmp_path: Path) -> None:
    parts = []
    for number in range(2):
        net = tiny_net(tiny_model("llama"))
        sampler = SandwichSampler(net.space, seed=0, n_random=0)
        if number:
            draws = sampler.draw(0, 0.0)
            seen = []
            for draw in draws:
                alone = tiny_net(tiny_model("llama"))
                one = only_largest(alone.space) if draw is draws[0] else alone.space
                gradients = record_gradients(alone)
                fixed = RandomSampler(one, 0) if draw is draws[0] else Always(draw.config)
                fit(alone, tmp_path / str(len(seen)), fixed, max_steps=1, batch_size=8)
                seen.append(sum(float(g.norm() ** 2) for g in gradients))
            assert all(size > 0 for size in seen)
        else:
            gradients = record_gradients(net)
            fit(net, tmp_path / "both", sampler, max_steps=1, batch_size=8)
            assert [len(gradients)] == [2 * 2 * len(net.adapters)]
        parts.append(net)


class Always:
    """A sampler of one configuration."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def draw(self, index: int, progress: float) -> list[Any]:
        return [elastune.sampling.Draw(self.config)]  # type: ignore[attr-defined]
