"""Training that was interrupted ends with the very bits of training that was not."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import encoded, tiny_model, tiny_net
from torch import Tensor

from elastune.config import TrainConfig
from elastune.errors import TrainingDiverged
from elastune.sampling import RandomSampler, SandwichSampler
from elastune.supernet import SuperNetwork
from elastune.train import TrainResult, train

EXAMPLES = encoded(9, 12, 5, 14, 7, 11, 6, 8, 10, 13, n_prompt=3)
#: 10 examples, 2 x 2 in a step: an epoch is 2 whole steps and a short one.
SETTINGS: dict[str, Any] = {
    "max_steps": 8,
    "batch_size": 2,
    "accumulation": 2,
    "learning_rate": 1e-2,
    "checkpoint_every": 2,
    "seed": 0,
}


class Killed(Exception):
    """Stands for whatever ends a run."""


def fit(folder: Path, *, dropout: float = 0.2, sandwich: bool = False, **changes: Any) -> Any:
    net = tiny_net(tiny_model("llama"), dropout=dropout)
    torch.manual_seed(int.from_bytes(folder.name.encode()[:4]))  # nobody may rely on this state
    kind: Any = SandwichSampler if sandwich else RandomSampler
    sampler = kind(net.space, seed=3)
    result = train(net, EXAMPLES, sampler, TrainConfig(**(SETTINGS | changes)), folder=folder)
    return net, result


def break_at_call(monkeypatch: pytest.MonkeyPatch, number: int, error: Exception | None) -> None:
    """Raise ``error`` in forward pass ``number`` (from 1), or make its loss NaN."""
    module = sys.modules["elastune.heads.causal_lm"]
    stock = module.completion_loss
    calls = 0

    def breaking(model: Any, batch: Any) -> tuple[Tensor, int]:
        nonlocal calls
        calls += 1
        loss, count = stock(model, batch)
        if calls == number:
            if error is not None:
                raise error
            return loss * float("nan"), count
        return loss, count

    monkeypatch.setattr(module, "completion_loss", breaking)


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


def assert_same(
    first: tuple[SuperNetwork, TrainResult], second: tuple[SuperNetwork, TrainResult]
) -> None:
    left, right = first[0].trained_state(), second[0].trained_state()
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    for field in ("steps", "final_loss", "tokens"):
        assert getattr(first[1], field) == getattr(second[1], field)


@pytest.mark.parametrize(
    ("call", "options"),
    [
        (8, {}),  # within step 5 and epoch 2; the checkpoint at step 4 is in the middle of epoch 2
        (11, {}),  # the checkpoint at step 6 is exactly the end of epoch 2
        (8, {"draw_per": "micro_batch"}),
        (8, {"dropout": 0.0}),
        (22, {"sandwich": True}),
        (8, {"gradient_checkpointing": True}),
        (8, {"schedule": "linear", "warmup": 0.5, "weight_decay": 0.1}),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(
    call: int, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        break_at_call(patch, call, Killed())
        with pytest.raises(Killed):
            fit(tmp_path / "broken", **options)
    assert checkpoints(tmp_path / "broken")
    assert_same(fit(tmp_path / "broken", **options), whole)
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    assert not checkpoints(tmp_path / "broken")


def test_a_run_can_be_interrupted_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(tmp_path / "whole")
    for call in (3, 7, 5, 2):
        with monkeypatch.context() as patch:
            break_at_call(patch, call, Killed())
            with pytest.raises(Killed):
                fit(tmp_path / "broken")
    assert_same(fit(tmp_path / "broken"), whole)
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


def test_a_checkpoint_that_was_not_written_to_its_end_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(tmp_path / "whole")
    folder = tmp_path / "broken"
    with monkeypatch.context() as patch:
        break_at_call(patch, 9, Killed())
        with pytest.raises(Killed):
            fit(folder)
    assert checkpoints(folder) == {"checkpoint-2", "checkpoint-4"}
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-6")
    (folder / "checkpoint-6" / "complete").unlink()
    (folder / "checkpoint-6" / "trained.safetensors").write_bytes(b"half")
    (folder / ".trained.safetensors.partial").write_bytes(b"half")
    assert_same(fit(folder), whole)
    assert rows(folder) == rows(tmp_path / "whole")


def test_a_run_that_ended_before_its_file_was_written_needs_no_more_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(tmp_path / "whole")
    folder = tmp_path / "broken"
    module = sys.modules["elastune.train"]  # `elastune.train` itself is the function
    stock = module.save_trained

    def last_one_fails(net: Any, where: Path) -> None:
        if where == folder:
            raise Killed
        stock(net, where)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_trained", last_one_fails)
        with pytest.raises(Killed):
            fit(folder)
    with monkeypatch.context() as patch:
        break_at_call(patch, 1, AssertionError("trained again"))
        assert_same(fit(folder), whole)


def test_a_run_killed_while_it_tidied_up_never_resumes_from_half_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(tmp_path / "whole")
    folder = tmp_path / "broken"
    stock = shutil.rmtree

    def killed_halfway(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name.startswith("checkpoint-8"):
            (Path(path) / "trained.safetensors").unlink()
            raise Killed
        stock(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed_halfway)
        with pytest.raises(Killed):
            fit(folder)
    assert_same(fit(folder), whole)


def test_divergence_names_the_step_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(tmp_path / "whole")
    folder = tmp_path / "broken"
    with monkeypatch.context() as patch:
        break_at_call(patch, 10, None)
        message = r"nan at step 6; checkpoint-4 is kept\ntry: a lower train.learning_rate"
        with pytest.raises(TrainingDiverged, match=message):
            fit(folder)
    assert (folder / "checkpoint-4" / "complete").exists()
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5]
    assert all(torch.tensor([row["loss"] for row in rows(folder)]).isfinite())
    assert_same(fit(folder), whole)


def test_divergence_before_any_checkpoint_says_so(tmp_path: Path) -> None:
    net = tiny_net(tiny_model("llama"))
    with torch.no_grad():
        net.model.get_parameter("model.embed_tokens.weight").fill_(float("inf"))
    sampler = RandomSampler(net.space, seed=3)
    with pytest.raises(TrainingDiverged, match="at step 1; no checkpoint had been written yet"):
        train(net, EXAMPLES, sampler, TrainConfig(**SETTINGS), folder=tmp_path)
    assert net.model.config._attn_implementation == "sdpa"
