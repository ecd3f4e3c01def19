"""Where the processes of a search compute: GPUs by turns, or shares of the processors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elastune import search_workers
from elastune.search_workers import Place, other_workers, places

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Let a machine have so many GPUs and processors."""

    def has(gpus: int, processors: int, visible: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(search_workers, "_processors", lambda: processors)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return has


def test_workers_take_gpus_by_turns(machine: Machine) -> None:
    machine(gpus=4, processors=32)
    assert [place.gpu for place in places(4)] == ["0", "1", "2", "3"]
    assert [place.gpu for place in places(6)] == ["0", "1", "2", "3", "0", "1"]
    assert {place.threads for place in places(4)} == {8}


def test_gpus_are_those_that_the_process_was_given(machine: Machine) -> None:
    machine(gpus=2, processors=8, visible="5, GPU-8932f937")
    assert [place.gpu for place in places(3)] == ["5", "GPU-8932f937", "5"]
    machine(gpus=0, processors=8, visible="")
    assert places(2) == [Place(None, 4)] * 2
    machine(gpus=0, processors=8, visible="-1")
    assert places(2) == [Place(None, 4)] * 2


def test_without_gpus_workers_share_the_processors(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(gpus=0, processors=7)
    assert places(2) == [Place(None, 3)] * 2
    assert places(9) == [Place(None, 1)] * 9
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert places(9) == [Place(None, 2)] * 9


def test_each_process_is_told_its_gpu_and_its_threads(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine(gpus=2, processors=9)
    script = (  # the processes themselves say what they were given
        "import json, os, sys; from pathlib import Path; Path(sys.argv[1]).write_text("
        "json.dumps([os.environ[n] for n in ('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS')]))"
    )
    real, started = subprocess.Popen, []

    def popen(command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        assert command[1:] == ["-m", "elastune", "work", str(tmp_path)]
        told = str(tmp_path / str(len(started)))
        started.append(real([sys.executable, "-c", script, told], env=env))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    lines: list[str] = []
    run: Any = SimpleNamespace(
        recipe=SimpleNamespace(search=SimpleNamespace(workers=3)),
        dir=SimpleNamespace(root=tmp_path),
        reporter=SimpleNamespace(say=lines.append),
    )
    before = torch.get_num_threads()
    with suppress(KeyboardInterrupt), other_workers(run):
        assert torch.get_num_threads() == 3
        for process in started:
            assert process.wait(60) == 0
        raise KeyboardInterrupt
    assert torch.get_num_threads() == before
    assert [json.loads((tmp_path / str(i)).read_text()) for i in range(2)] == [
        ["1", "3"],
        ["0", "3"],
    ]
    assert lines == ["3 workers on GPU 0, 1, 0"]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_processes_end_with_the_search_that_started_them(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine(gpus=0, processors=4)
    real, started = subprocess.Popen, []

    def popen(command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        started.append(real([sys.executable, "-c", "import time; time.sleep(600)"], env=env))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    run: Any = SimpleNamespace(
        recipe=SimpleNamespace(search=SimpleNamespace(workers=3)),
        dir=SimpleNamespace(root=tmp_path),
        reporter=SimpleNamespace(say=lambda line: None),
    )
    with suppress(ZeroDivisionError), other_workers(run):
        assert [process.poll() for process in started] == [None, None]
        _ = 1 / 0
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)
