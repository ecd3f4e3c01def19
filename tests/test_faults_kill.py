"""Runs that are killed in every stage, again and again, end with the files of one that was not."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import faults
import pytest
from faults import STAGES, Fault, attempt, commands, differences, outcome, save_method

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform == "win32", reason="forks"),
]

KILLS_PER_STAGE = 2
KILLS_BY_CLOCK = 3
_WINDOW = 12
"""Changes of files after the first of a stage among which the killing one is drawn."""


@pytest.fixture(scope="module")
def context() -> Any:
    return faults.fork_server()


def targets(stages: list[str], kills: int, rng: random.Random) -> list[Fault]:
    """Draw changes of files to die at, stage by stage."""
    found = []
    for number, stage in enumerate(stages):
        passed = frozenset(stages[number + 1 :])
        found += [Fault(stage, rng.randrange(1, _WINDOW), passed=passed) for _ in range(kills)]
    return found


def kill_all_along(
    context: Any, method: str, folder: Path, kills: int, by_clock: int, seed: int, export: bool
) -> tuple[Counter[str], list[str], dict[str, int]]:
    """Kill a run in each of its stages, finish it, and compare it with one that was left alone.

    Returns:
        kills by stage; the files that differ; and stages -> rows of work that was done twice.
    """
    recipe = save_method(folder, method)
    out, whole = folder / "run", folder / "whole"
    todo = commands(recipe, out, method)[: 2 if export else 1]
    for command in todo:
        done = attempt(context, command, out)
        assert done.code == 0, (command, done.out, done.err)
    stages = faults.order_of(out)
    assert set(stages) <= set(STAGES)
    out.rename(whole)
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    for command in todo:
        mine = [s for s in stages if (s == "export") == (command[0] == "export")]
        plan: list[Any] = list(targets(mine, kills, rng))
        for _ in range(by_clock if command[0] == "run" else 0):
            plan.insert(rng.randrange(len(plan)), None)
        for fault in plan:
            after = rng.uniform(0.5, 6.0) if fault is None else None
            died = attempt(context, command, out, fault, after=after)
            place = died.struck or died.stage
            sys.stderr.write(f"{method}: aimed at {fault and fault.stage}, hit {place}\n")
            if died.code == 0:  # it was done before its time came: from the beginning, then
                shutil.rmtree(out)
                continue
            assert died.code == -signal.SIGKILL, (fault, died.code, died.out, died.err)
            counts[died.struck[1] if died.struck else died.stage] += 1
        done = attempt(context, command, out)
        assert done.code == 0, (counts, done.out, done.err)
    return counts, differences(outcome(out), outcome(whole)), steps_again(out)


def steps_again(out: Path) -> dict[str, int]:
    """Return how many trials were opened more than the search has, from its journal."""
    lines = (out / "search" / "study.journal").read_text().splitlines()
    opened = sum(json.loads(line)["op_code"] == 4 for line in lines)
    trials = json.loads((out / "search" / "trials.json").read_text())["trials"]
    return {"trials": opened - len(trials)}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method", faults.METHODS)
def test_kills_in_every_stage_change_nothing_in_the_end(
    method: str, seed: int, context: Any, tmp_path: Path
) -> None:
    counts, differ, again = kill_all_along(
        context, method, tmp_path, KILLS_PER_STAGE, KILLS_BY_CLOCK, seed, export=seed == 0
    )
    sys.stderr.write(
        f"\n{method}, seed {seed}: {counts.total()} kills: {dict(counts)}; again: {again}\n"
    )
    assert differ == []
    assert counts.total() >= 12
