"""Full disks, files that may not be as large, and folders that nobody can write to."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
from faults import Fault, attempt, commands, differences, outcome, save_method

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform == "win32", reason="forks"),
]

STEP = 64
"""KiB by which a full disk grows."""


@pytest.fixture(scope="module")
def context() -> Any:
    return faults.fork_server()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", f"size={STEP}k", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"file systems cannot be mounted here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*options: str) -> None:
    subprocess.run(["mount", *options], check=True, capture_output=True)


def assert_refused(ended: faults.Attempt, *words: str) -> None:
    """It ended with exit code 2 and one message, which says how to go on."""
    told = " ".join(ended.err.split())
    assert ended.code == 2, ended
    assert "Traceback" not in told
    assert told.count("error:") == told.count("try:") == 1, told
    assert "cannot write" in told
    assert "run again to go on from here" in told
    assert all(word in told for word in words), told


def strays(out: Path) -> list[Path]:
    """Return half-written files; answers that a run goes on from are none."""
    return [path for path in out.rglob(".*") if path.parent.name != "predictions"]


def finished(context: Any, folder: Path, method: str, out: Path, export: bool = False) -> Any:
    """Return the outcome of a run that nothing broke, and its command lines."""
    todo = commands(save_method(folder, method), out, method)[: 2 if export else 1]
    for command in todo:
        done = attempt(context, command, out)
        assert done.code == 0, done.err
    return outcome(out), todo


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", ["lonas", "eftnas"])
def test_a_disk_that_is_full_again_and_again_costs_nothing_but_time(
    method: str, context: Any, disk: Path, tmp_path: Path
) -> None:
    out = disk / "run"
    mount("-o", "remount,size=100m", str(disk))
    wanted, [command] = finished(context, tmp_path, method, out)
    shutil.rmtree(out)
    size = 16
    stages = []
    while True:
        mount("-o", f"remount,size={size}k", str(disk))
        ended = attempt(context, command, out)
        if ended.code == 0:
            break
        assert_refused(ended)
        assert not strays(out), stages
        stages.append(ended.stage)
        size += STEP
        assert size < 100_000
    sys.stderr.write(f"{method}: full at {size} KiB in all; in {stages}\n")
    assert len(set(stages)) >= 3  # weights of the same size in a row leave no room for more
    assert differences(outcome(out), wanted) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", ["lonas", "eftnas"])
def test_a_disk_that_is_full_in_any_stage_is_one_message(
    method: str, context: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    wanted, [command] = finished(context, tmp_path, method, out)
    stages = faults.order_of(out)
    shutil.rmtree(out)
    for stage in stages:
        # The second change of a report is that it gets its name, which takes no space.
        ended = attempt(context, command, out, Fault(stage, 1 if stage == "report" else 2, "full"))
        assert ended.struck is not None, (stage, ended)
        assert_refused(ended)
    assert attempt(context, command, out).code == 0
    assert differences(outcome(out), wanted) == []


def test_a_file_that_may_not_be_as_large_is_one_message_and_the_run_goes_on(
    context: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command, _ = commands(save_method(tmp_path, "shears"), out, "shears")
    assert_refused(attempt(context, command, out, max_file=20_000))
    assert not strays(out)
    assert attempt(context, command, out).code == 0


def test_a_folder_that_is_read_only_is_one_message(
    context: Any, disk: Path, tmp_path: Path
) -> None:
    out = disk / "run"
    command, _ = commands(save_method(tmp_path, "shears"), out, "shears")
    mount("-o", "remount,ro", str(disk))
    assert_refused(attempt(context, command, out), "Read-only file system", str(out))
    assert list(disk.iterdir()) == []
