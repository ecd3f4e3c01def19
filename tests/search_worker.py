"""A worker process of the search tests: ``python search_worker.py SETTINGS``, a JSON object.

It says when it is ready, waits for a signal so that all begin together, searches with a toy
objective that notes what it begins and ends to measure, and prints the trials it got.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastune.search import search, workers
from elastune.search.storages import JournalFile
from elastune.space import ElasticDim, SearchSpace, SubnetConfig

VALUES = ("loss", "params")
SPACE = SearchSpace([ElasticDim(f"d{i}", "rank", (24, 16, 8), (f"m{i}",)) for i in range(6)])


def measure(config: SubnetConfig) -> dict[str, float]:
    params = float(sum(config.values()))
    wave = sum(math.sin(i * choice) for i, choice in enumerate(config.values(), start=1))
    return {"loss": wave - params / 50, "params": params, "wave": wave}


class Noted:
    """The toy objective; appends to ``log`` what it does, and hangs at one evaluation."""

    def __init__(self, log: Path, seconds: float = 0.0, hang_at: int | None = None) -> None:
        self.log, self.seconds, self.hang_at = log, seconds, hang_at
        self.count = 0

    def note(self, what: str, config: SubnetConfig) -> None:
        with self.log.open("a") as file:
            file.write(f"{what}\t{os.getpid()}\t{config.to_json()}\n")

    def __call__(self, config: SubnetConfig) -> dict[str, float]:
        self.note("begin", config)
        if self.count == self.hang_at:
            self.note("hang", config)
            time.sleep(600)
        self.count += 1
        time.sleep(self.seconds)
        self.note("end", config)
        return measure(config)


def noted(log: Path, what: str) -> Counter[str]:
    """Return how often each configuration was begun, or ended, or hung."""
    rows = [line.split("\t") for line in log.read_text().splitlines()] if log.exists() else []
    return Counter(config for kind, _, config in rows if kind == what)


def start_worker(folder: Path, storage: str, **settings: Any) -> subprocess.Popen[str]:
    """Start a worker, whose search begins once `begin` is called."""
    text = json.dumps({"folder": str(folder), "storage": storage} | settings)
    command = [sys.executable, __file__, text]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def begin(folder: Path, processes: Sequence[subprocess.Popen[str]]) -> None:
    """Let all workers begin at once."""
    wait_for(lambda: len(list(folder.glob("ready-*"))) == len(processes))
    (folder / "go").touch()


def check_three_workers_one_of_which_is_killed(folder: Path, storage: str) -> None:
    """Let three workers make 18 trials, kill one in the middle of its second; nothing is lost."""
    settings: dict[str, Any] = {"trials": 18, "seconds": 0.04}
    victim = start_worker(folder, storage, **settings, hang_at=1)
    others = [start_worker(folder, storage, **settings) for _ in range(2)]
    begin(folder, [victim, *others])
    log = folder / "log"
    wait_for(lambda: noted(log, "hang"))
    victim.kill()
    told = [json.loads(process.communicate(timeout=60)[0]) for process in others]
    victim.communicate()
    assert [process.returncode for process in (victim, *others)] == [-signal.SIGKILL, 0, 0]
    assert told[0] == told[1]
    configs = [json.dumps(trial["config"]) for trial in told[0]]
    assert [trial["number"] for trial in told[0]] == list(range(18))
    assert len(set(configs)) == 18
    for trial in told[0]:
        expected = measure(SubnetConfig(trial["config"]))
        assert trial["values"] | trial["measured"] == expected
    [lost] = noted(log, "hang")
    assert noted(log, "end") == Counter(configs)
    assert noted(log, "begin") == Counter([*configs, lost])
    workers_seen = {line.split("\t")[1] for line in log.read_text().splitlines()}
    assert len(workers_seen) == 3


def work(settings: dict[str, Any]) -> None:
    """Search as one of several workers."""
    folder = Path(settings["folder"])
    if "machine" in settings:
        workers.machine = lambda: settings["machine"]
    workers.BEAT_SECONDS = settings.get("beat", workers.BEAT_SECONDS)
    (folder / f"ready-{os.getpid()}").touch()
    wait_for((folder / "go").exists)
    objective = Noted(folder / "log", settings.get("seconds", 0.0), settings.get("hang_at"))
    result = search(
        SPACE,
        objective,
        values=VALUES,
        algorithm=settings.get("algorithm", "hill_climb"),
        trials=settings["trials"],
        storage=settings["storage"],
    )
    found = [
        {
            "number": trial.number,
            "config": dict(trial.config),
            "values": dict(trial.values),
            "measured": dict(trial.measured),
        }
        for trial in result.trials
    ]
    sys.stdout.write(json.dumps(found))


# --- killing a search at every write --------------------------------------------------------------


class DyingJournal(JournalFile):
    """A journal whose process is killed at one of its writes, in the middle of it or behind it."""

    writes = 0
    last: int | None = None
    torn = False

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        cls = type(self)
        if cls.writes == cls.last and cls.torn:
            with self.path.open("ab") as file:
                line = json.dumps(logs[0], separators=(",", ":")).encode()
                file.write(line[: len(line) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        super().append_logs(logs)
        if cls.writes == cls.last:
            os.kill(os.getpid(), signal.SIGKILL)
        cls.writes += 1


def kill_everywhere(settings: dict[str, Any]) -> None:
    """Kill a search at every write of the journal, go on, and print how that ended each time."""
    from elastune.search import storages

    folder = Path(settings["folder"])
    storages.JournalFile = DyingJournal
    options: dict[str, Any] = {"values": VALUES, "trials": settings["trials"], "seed": 3}
    options["algorithm"] = settings["algorithm"]
    whole = search(SPACE, measure, storage=folder / "whole", **options)
    count = DyingJournal.writes
    ends = []
    for last in range(count):
        for torn in (False, True):
            path, log = folder / f"{last}{torn}", folder / f"{last}{torn}.log"
            child = os.fork()
            if not child:
                DyingJournal.writes, DyingJournal.last, DyingJournal.torn = 0, last, torn
                search(SPACE, Noted(log), storage=path, **options)
                os._exit(1)
            status = os.waitpid(child, 0)[1]
            resumed = search(SPACE, Noted(log), storage=path, **options)
            again = sum(noted(log, "end").values()) - len(whole.trials)
            ends.append([os.WTERMSIG(status), resumed == whole, again])
    sys.stdout.write(json.dumps({"writes": count, "ends": ends}))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    kill_everywhere(given) if given.get("kill") else work(given)
