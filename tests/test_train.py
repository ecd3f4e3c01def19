"""Training: gradients, the log, the schedule, and stock PEFT as the oracle."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import encoded, tiny_model, tiny_net
from torch import Tensor, nn

from elastune.config import TrainConfig
from elastune.errors import BadArtifact
from elastune.sampling import RandomSampler, SandwichSampler
from elastune.sparsify import Sparsity, sparsify_
from elastune.supernet import SuperNetwork
from elastune.train import TrainResult, train
from elastune.trained import load_trained

EXAMPLES = encoded(9, 12, 5, 14, 7, 11, 6, 8, n_prompt=3)


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
    module = sys.modules["elastune.heads.causal_lm"]
    stock = module.completion_loss

    def watched(model: Any, batch: Any) -> tuple[Tensor, int]:
        see(model, batch)
        return stock(model, batch)

    monkeypatch.setattr(module, "completion_loss", watched)


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
        # Nothing of it is left behind, so that the model is trained or run as before.
        assert not any(getattr(m, "gradient_checkpointing", False) for m in net.model.modules())
        assert not net.model.get_input_embeddings()._forward_hooks
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


def loss_by_hand(model: Any) -> Tensor:
    """The mean over all labelled tokens: stock forward passes and torch's own cross entropy."""
    total, count = torch.zeros(()), 0
    for example in EXAMPLES:
        ids = torch.tensor([example.input_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, example.n_prompt - 1 : -1]
        labels = ids[0, example.n_prompt :]
        total = total + nn.functional.cross_entropy(logits, labels, reduction="sum")
        count += len(labels)
    return total / count


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4), (3, 3)])
def test_the_gradient_of_a_step_is_the_weighted_mean_over_its_tokens_and_draws(
    batch_size: int, accumulation: int, tmp_path: Path
) -> None:
    net = tiny_net(tiny_model("llama"))
    sampler = SandwichSampler(net.space, seed=0, n_random=0)
    names = [name for name, p in net.model.named_parameters() if p.requires_grad]
    expected = {name: torch.zeros(()) for name in names}
    loss = 0.0
    for config in (net.space.largest(), net.space.smallest()):
        with net.active(config):
            part = loss_by_hand(net.model) / 2
        loss += float(part.detach())
        found = torch.autograd.grad(part, [net.model.get_parameter(name) for name in names])
        expected = {n: expected[n] + g for n, g in zip(names, found, strict=True)}

    summed = {name: torch.zeros(()) for name in names}
    for name in names:
        net.model.get_parameter(name).register_hook(
            lambda grad, name=name: summed.__setitem__(name, summed[name] + grad)
        )
    fit(net, tmp_path, sampler, max_steps=1, batch_size=batch_size, accumulation=accumulation)
    for name in names:
        atol = 1e-5 * float(expected[name].abs().max())
        torch.testing.assert_close(summed[name], expected[name], atol=atol, rtol=1e-4)
    (row,) = rows(tmp_path)
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["tokens"] == 2 * sum(len(e.input_ids) - 1 for e in EXAMPLES)


def test_accumulation_gives_the_weights_of_the_larger_batch(tmp_path: Path) -> None:
    start = torch.cat([t.flatten() for t in tiny_net(tiny_model("llama")).trained_state().values()])
    moved = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        net = tiny_net(tiny_model("llama"))
        folder = tmp_path / str(batch_size)
        fit(net, folder, batch_size=batch_size, accumulation=accumulation)
        moved.append(torch.cat([t.flatten() for t in net.trained_state().values()]) - start)
    # Compared as a whole: AdamW magnifies rounding in the few weights whose gradient is near 0.
    for other in moved[1:]:
        assert float((other - moved[0]).norm() / moved[0].norm()) < 1e-3


def test_every_epoch_reads_every_example_once_and_in_an_order_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, ...]] = []

    def see(_: Any, batch: Any) -> None:
        starts = batch.starts.tolist()
        ids = batch.input_ids[0].tolist()
        read.extend(tuple(ids[a:b]) for a, b in pairwise(starts))

    spy(monkeypatch, see)
    for name in ("first", "again"):
        net = tiny_net(tiny_model("llama"))
        fit(net, tmp_path / name, max_steps=None, epochs=2, batch_size=3)
    everything = sorted(tuple(e.input_ids[:-1]) for e in EXAMPLES)
    first, second, *again = (read[i : i + 8] for i in range(0, 32, 8))
    assert sorted(first) == sorted(second) == everything
    assert first != second
    assert again == [first, second]


def test_the_learning_rate_climbs_from_0_and_then_falls_along_the_cosine(tmp_path: Path) -> None:
    net = tiny_net(tiny_model("llama"))
    fit(net, tmp_path, max_steps=10, warmup=0.3, learning_rate=0.01)
    rates = [row["lr"] for row in rows(tmp_path)]
    cosine = [0.005 * (1 + math.cos(math.pi * step / 7)) for step in range(7)]
    assert rates == pytest.approx([0.0, 0.01 / 3, 0.02 / 3, *cosine])


@pytest.mark.parametrize("report_to", [[], ["tensorboard"]])
def test_the_base_stays_as_it_is_bit_for_bit(report_to: list[str], tmp_path: Path) -> None:
    model = tiny_model("llama")
    sparsify_(model, "magnitude", Sparsity.parse(0.5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert sum(int((t == 0).sum()) for t in before.values()) > 5000
    net = SuperNetwork(model, tiny_net(tiny_model("llama")).space, alpha=16)
    fit(net, tmp_path, report_to=report_to, weight_decay=0.1)
    assert any(adapter.lora_B.any() for adapter in net.adapters.values())
    after = net.unwrap().state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_tensorboard_shows_the_losses_of_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(tiny_net(tiny_model("llama")), tmp_path, report_to=["tensorboard"])
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(events.parent))
    reader.Reload()
    written = {event.step: event.value for event in reader.Scalars("train/loss")}
    logged = {row["step"]: row["loss"] for row in rows(tmp_path)}
    assert written == pytest.approx(logged, rel=1e-3)


def test_trackio_shows_the_losses_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_train import fit
from tiny_models import tiny_model, tiny_net
fit(tiny_net(tiny_model("llama")), Path(sys.argv[2]), report_to=["trackio"])
from trackio.sqlite_storage import SQLiteStorage as store
(project,) = store.get_projects()
(run,) = store.get_runs(project)
import json
rows = [row for row in store.get_logs(project, run) if "train/loss" in row]
print("LOGGED", json.dumps({row["train/global_step"]: row["train/loss"] for row in rows}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "out")],
        env=os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shown = json.loads(done.stdout.partition("LOGGED ")[2].splitlines()[0])
    logged = {str(row["step"]): row["loss"] for row in rows(tmp_path / "out")}
    assert shown == pytest.approx(logged, rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_a_space_of_one_choice_trains_as_stock_peft_lora_does(tmp_path: Path) -> None:
    net = tiny_net(tiny_model("llama"), ranks=(4,))
    start = {name: tensor.clone() for name, tensor in net.trained_state().items()}
    fit(net, tmp_path, max_steps=5, batch_size=8, warmup=0.0, schedule="constant")

    stock: Any = get_peft_model(
        tiny_model("llama"), LoraConfig(r=4, lora_alpha=16, target_modules=sorted(net.adapters))
    )
    trained = {}
    for name, parameter in stock.named_parameters():
        if parameter.requires_grad:
            ours = name.removeprefix("base_model.model.").replace(".default.weight", "")
            parameter.data.copy_(start[ours])
            trained[ours] = parameter
    assert trained.keys() == start.keys()
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(5):
        loss = loss_by_hand(stock)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert [row["loss"] for row in rows(tmp_path)] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0]
    for name, tensor in net.trained_state().items():
        assert not torch.equal(tensor, start[name])
        torch.testing.assert_close(tensor, trained[name].detach(), atol=1e-4, rtol=1e-3)


def test_the_file_holds_the_trained_weights_and_reads_back(tmp_path: Path) -> None:
    net = tiny_net(tiny_model("llama"))
    result = fit(net, tmp_path)
    assert result.steps == 4
    assert result.final_loss == rows(tmp_path)[-1]["loss"]
    assert not net.model.training
    assert net.model.config._attn_implementation == "sdpa"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "train.jsonl",
        "trained.safetensors",
    ]
    state = load_file(tmp_path / "trained.safetensors")
    other = tiny_net(tiny_model("llama"), seed=9)
    load_trained(other, tmp_path)
    for name, tensor in other.trained_state().items():
        assert torch.equal(tensor, net.trained_state()[name])
        assert torch.equal(tensor, state[name])


def test_damaged_and_missing_weights_name_the_way_out(tmp_path: Path) -> None:
    net = tiny_net(tiny_model("llama"))
    with pytest.raises(BadArtifact, match="cannot be read"):
        load_trained(net, tmp_path)
    (tmp_path / "trained.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(BadArtifact, match="try: delete"):
        load_trained(net, tmp_path)


def test_progress_is_told_after_every_step(tmp_path: Path) -> None:
    net = tiny_net(tiny_model("llama"))
    told: list[tuple[int, int, dict[str, float]]] = []
    sampler = RandomSampler(net.space, seed=3)
    train(net, EXAMPLES, sampler, settings(), folder=tmp_path, progress=lambda *t: told.append(t))
    assert [(done, total) for done, total, _ in told] == [(n, 4) for n in range(1, 5)]
    assert [facts["loss"] for *_, facts in told] == [row["loss"] for row in rows(tmp_path)]
