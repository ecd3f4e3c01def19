"""Ctrl-C, SIGTERM, a second run in the same folder, too little memory, a loss that is NaN."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import faults
import pytest
from faults import Fault, attempt, commands, differences, outcome, save_method

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform == "win32", reason="forks"),
]

SAID = {
    signal.SIGINT: (130, "interrupted; run the same command again to go on"),
    signal.SIGTERM: (143, "terminated; run the same command again to go on"),
}


@pytest.fixture(scope="module")
def context() -> Any:
    return faults.fork_server()


def assert_ended_by(ended: faults.Attempt, kind: signal.Signals) -> None:
    code, line = SAID[kind]
    assert ended.code == code, ended
    assert " ".join(ended.err.split()).count(line) == 1, ended.err
    assert "Traceback" not in ended.err


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", ["lonas", "eftnas"])
def test_a_signal_in_any_stage_is_one_line_and_the_run_goes_on(
    method: str, context: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command, _ = commands(save_method(tmp_path, method), out, method)
    assert attempt(context, command, out).code == 0
    stages = faults.order_of(out)
    out.rename(tmp_path / "whole")
    told = []
    for number, stage in enumerate(stages):
        passed = frozenset(stages[number + 1 :])
        for kind in (signal.SIGINT, signal.SIGTERM):
            nth = 1 if stage == "report" else 3  # a report is one file
            ended = attempt(context, command, out, Fault(stage, nth, kind, passed))
            assert ended.struck is not None, (stage, ended)
            assert_ended_by(ended, kind)
            assert not (out / ".lock").exists()
            told.append((kind.name, ended.struck[1]))
    sys.stderr.write(f"{method}: {told}\n")
    assert attempt(context, command, out).code == 0
    assert differences(outcome(out), outcome(tmp_path / "whole")) == []


@pytest.mark.parametrize("kind", [signal.SIGTERM])
def test_a_signal_in_training_is_one_line_and_an_exit_code(
    kind: signal.Signals, context: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command, _ = commands(save_method(tmp_path, "shears"), out, "shears")
    assert_ended_by(attempt(context, command, out, Fault("train", 6, kind)), kind)
    assert not (out / ".lock").exists()
    assert not list(out.rglob(".*"))


def lose_memory() -> None:
    """Let the third forward pass of training find no memory."""
    import torch

    from elastune.heads import causal_lm

    break_loss(causal_lm, 3, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))


def lose_numbers() -> None:
    """Let the loss be NaN from the third step on."""
    from elastune.heads import causal_lm

    break_loss(causal_lm, 3, None)


def break_loss(module: Any, number: int, error: Exception | None) -> None:
    stock, calls = module.completion_loss, [0]

    def breaking(model: Any, batch: Any) -> Any:
        calls[0] += 1
        loss, count = stock(model, batch)
        if calls[0] < number:
            return loss, count
        if error is not None:
            raise error
        return loss * float("nan"), count

    module.completion_loss = breaking


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (lose_memory, ["out of memory: CUDA out of memory", "train.batch_size", "--update"]),
        pytest.param(
            lose_numbers,
            ["the loss became nan at step 3", "train.learning_rate", "checkpoint-2"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_training_that_cannot_go_on_says_which_settings_to_change(
    setup: Any, words: list[str], context: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command, _ = commands(save_method(tmp_path, "shears"), out, "shears")
    ended = attempt(context, command, out, setup=setup)
    told = " ".join(ended.err.split())
    assert ended.code == 2, told
    assert told.count("error:") == told.count("try:") == 1, told
    assert "Traceback" not in told
    assert all(word in told for word in words), told
    assert (out / "supernet" / "checkpoint-2" / "complete").exists()
    train = ["train", *command[1:]]
    assert attempt(context, train, out).code == 0
    whole = tmp_path / "whole"
    assert attempt(context, [*train[:-1], str(whole)], whole).code == 0
    name = "supernet/trained.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused_and_the_first_is_not_disturbed(
    context: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command, _ = commands(save_method(tmp_path, "shears"), out, "shears")
    train = ["train", *command[1:]]
    first = context.Process(target=attempt_inside, args=(train, out))
    first.start()
    deadline = time.monotonic() + 120
    while not (out / "base").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    second = attempt(context, train, out, notes="second")
    told = " ".join(second.err.split())
    assert second.code == 2, second
    assert f"another run is at work in {out}" in told
    assert told.count("error:") == told.count("try:") == 1
    first.join()
    assert first.exitcode == 0
    whole = tmp_path / "whole"
    assert attempt(context, [*train[:-1], str(whole)], whole).code == 0
    assert differences(outcome(out), outcome(whole)) == []


def attempt_inside(arguments: list[str], out: Path) -> None:
    faults.child(arguments, out, faults.fresh_notes(out, "first"))
