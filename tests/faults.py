"""The driver of the fault tests: command lines in forked processes that break where they are told.

A fork server imports everything once, so that an attempt costs no start-up. Each attempt runs one
command line over one folder, and may be killed at its n-th change of a file in some stage, be sent
a signal there, meet a full disk, or be killed by the clock.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tiny_run import save_recipe, save_sums, save_tiny_model, tiny_recipe

from elastune.cli import main

STAGES = (
    *("importance", "space", "sparsify", "train", "teacher", "baselines", "budgets", "search"),
    *("evaluate", "extract", "report", "export"),
)
"""Stages by the files that they write."""

_OWNERS = {
    "base": "sparsify",
    "importance.safetensors": "importance",
    "movement": "importance",
    "generated.json": "space",
    "generated_choices.jsonl": "space",
    "space.json": "space",
    "supernet": "train",
    "teacher": "teacher",
    "baselines": "baselines",
    "search/single_choices.jsonl": "budgets",
    "search/budgets.json": "budgets",
    "search": "search",
    "predictions": "evaluate",
    "metrics.json": "evaluate",
    "subnets": "extract",
    "report.html": "report",
    "export": "export",
    "exports.json": "export",
}
_CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
#: What differs between two equal runs.
_VOLATILE = {"seconds", "finished", "latency_ms", "decode_latency_ms", "environment"}
_VOLATILE |= {"versions", "seal"}


@dataclass(frozen=True)
class Fault:
    """What breaks an attempt.

    Attributes:
        stage: one of `STAGES`, where it strikes; None for any.
        nth: change of a file of that stage, from 1. It strikes at the first change of a later
            stage of the command if this one has fewer.
        kind: a signal that the process sends itself, or ``full``: from there on nothing can be
            written to the folder, as on a full disk.
        passed: stages that are over once the given one is; see above.
    """

    stage: str | None
    nth: int
    kind: signal.Signals | str = signal.SIGKILL
    passed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Attempt:
    """How a command line ended.

    Attributes:
        code: exit code, negative for a signal.
        out, err: what it printed.
        changes: how often it changed a file of each stage; empty if it was killed.
        stage: that wrote last.
        struck: path in the folder, and its stage, at which the fault struck.
    """

    code: int
    out: str
    err: str
    changes: Mapping[str, int] = field(default_factory=dict)
    stage: str = "start"
    struck: tuple[str, str] | None = None


def stage_of(path: str) -> str | None:
    """Return the stage that owns a path in a run directory; None for what all stages write."""
    parts = [part.removeprefix(".").partition(".partial")[0] for part in Path(path).parts]
    names = ("/".join(parts[:2]), parts[0] if parts else "")
    return next((_OWNERS[name] for name in names if name in _OWNERS), None)


def fork_server() -> Any:
    """Return a context whose processes are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["elastune.check", "elastune.methods", "elastune.report", "faults"]
    )
    return context


def attempt(
    context: Any,
    arguments: Sequence[str | Path],
    folder: Path,
    fault: Fault | None = None,
    *,
    after: float | None = None,
    max_file: int | None = None,
    setup: Any = None,
    notes: str = "notes",
) -> Attempt:
    """Run one command line, and wait for its end.

    Args:
        context: from `fork_server`.
        arguments: of ``elastune``.
        folder: whose changes count.
        fault: what breaks it.
        after: seconds after which it is killed from outside.
        max_file: bytes that a file may have at most (RLIMIT_FSIZE).
        setup: called in the child before the command; must be importable.
        notes: tells apart those that run at once.
    """
    told = fresh_notes(folder, notes)
    texts = [str(argument) for argument in arguments]
    process = context.Process(target=child, args=(texts, folder, told, fault, max_file, setup))
    process.start()
    if after is not None:
        deadline = time.monotonic() + 120
        while not (told / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.join(after)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
    process.join()
    struck = _read(told / "struck")
    return Attempt(
        process.exitcode,
        _read(told / "out"),
        _read(told / "err"),
        json.loads(_read(told / "changes") or "{}"),
        _read(told / "stage") or "start",
        tuple(json.loads(struck)) if struck else None,  # type: ignore[arg-type]
    )


def fresh_notes(folder: Path, name: str) -> Path:
    """Return an empty folder for what an attempt tells; not on the disk of the run, if small."""
    notes = folder.parent.parent / f"{folder.parent.name}.{folder.name}.{name}"
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir()
    return notes


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def child(
    arguments: list[str],
    folder: Path,
    notes: Path,
    fault: Fault | None = None,
    max_file: int | None = None,
    setup: Any = None,
) -> None:
    """Run one command line in this process, and end it; `attempt` starts it in one of its own."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(notes / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Ignored in the children of a shell's background jobs, and then nobody could interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if max_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file, max_file))
    if setup is not None:
        setup()
    watch = _Watch(folder, notes, fault)
    sys.addaudithook(watch)
    (notes / "begun").touch()
    sys.argv = ["elastune", *arguments]
    try:
        main()
    finally:
        watch.active = False
        (notes / "changes").write_text(json.dumps(watch.changes))


class _Watch:
    """An audit hook that counts changes of files by stage, and strikes at one of them."""

    def __init__(self, folder: Path, notes: Path, fault: Fault | None) -> None:
        self.folder, self.notes, self.fault = str(folder), notes, fault
        self.changes: dict[str, int] = {}
        self.stage = "start"
        self.active, self.full = True, False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active or event not in _CHANGES:
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | Path) else ""
        if not path.startswith(self.folder + os.sep):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        inside = os.path.relpath(path, self.folder)
        if inside == ".lock":  # of no stage, and gone when the process is
            return
        name = stage_of(inside) or self.stage
        if name != self.stage:
            self.stage = name
            self._note("stage", name)
        self.changes[name] = self.changes.get(name, 0) + 1
        if self.full and event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if self.fault is not None and self._is_due(name):
            self._strike(event, inside, name, path)

    def _note(self, name: str, text: str) -> None:
        with (self.notes / name).open("w") as file:  # not below the folder, so it does not count
            file.write(text)

    def _is_due(self, name: str) -> bool:
        assert self.fault is not None
        if self.fault.stage is None:
            return sum(self.changes.values()) == self.fault.nth
        if name in self.fault.passed:
            return True
        return name == self.fault.stage and self.changes[name] == self.fault.nth

    def _strike(self, event: str, inside: str, name: str, path: str) -> None:
        assert self.fault is not None
        kind, self.fault = self.fault.kind, None
        self._note("struck", json.dumps([inside, name]))
        if isinstance(kind, signal.Signals):
            os.kill(os.getpid(), kind)
            return
        self.full = True
        if event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


# --- runs -----------------------------------------------------------------------------------------

_STRUCTURE: dict[str, Any] = {
    "ffn": [1.0, 0.67, 0.34],
    "heads": [1.0, 0.5],
    "depth": [1],
    "round_to": 8,
    "budgets": [0.8],
    "allocation": ["knapsack", "uniform"],
    "probes": 4,
    "calibration": {"source": "task", "n_sequences": 4, "length": 16},
}
_GENERATED: dict[str, Any] = {
    "generate": {"points": [1.0, 0.7, 0.4], "tolerance": 0.1},
    "round_to": 1,
    "budgets": [0.7],
    "budget_slack": 0.25,
    "allocation": "points",
}
_METHODS: dict[str, dict[str, Any]] = {
    "shears": {},
    "lonas": {"method": "lonas", "structure": _STRUCTURE},
    "eftnas": {
        "method": "eftnas",
        "start": "dense+full",
        "structure": _GENERATED,
        "importance": {"method": "fisher", "examples": 8, "rounds": 3},
        "train": {"full_learning_rate": 1e-3},
        "search": {"algorithm": "hill_climb", "objective": "loss", "cost": "block_macs"},
        "baselines": ["dense", "dense+full", "alone"],
    },
    "sqft": {
        "method": "sqft",
        "adapter": {"keep": "zeros"},
        "baselines": ["sparse", "sparse+lora"],
    },
}
METHODS = tuple(_METHODS)
EXPORTS = {"shears": "peft", "lonas": "hf-padded", "eftnas": "hf-padded", "sqft": "hf"}
"""A format for each method that is written in little time."""


def save_method(folder: Path, method: str, **sections: Any) -> Path:
    """Save a model, data and a recipe of one method, all tiny; return the recipe's path."""
    model, data = folder / "model", folder / "data"
    if not model.exists():
        save_tiny_model(model)
        save_sums(data)
    recipe = tiny_recipe(model, data, **_METHODS[method])
    if method == "eftnas":
        recipe["adapter"] = {"ranks": []}
    recipe["search"]["trials"] = 4
    for name, value in sections.items():
        old = recipe.get(name)
        recipe[name] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
    return save_recipe(folder / f"{method}.yaml", recipe)


def commands(recipe: Path, out: Path, method: str) -> list[list[str]]:
    """Return the command lines of a run and an export."""
    export = ["export", str(out), "--format", EXPORTS[method]]
    return [["run", str(recipe), "--out", str(out)], export]


# --- outcomes -------------------------------------------------------------------------------------


def outcome(folder: Path) -> dict[str, Any]:
    """Return every file of a run, without what differs between two equal runs.

    Weights count bit by bit; of the journal and of pages only that they are there: the trials and
    the figures that they hold are in trials.json and metrics.json.
    """
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if name == "manifest.json":
            stages = json.loads(path.read_text())["stages"]
            found[name] = {n: (row["status"], row["input_hash"]) for n, row in stages.items()}
        elif path.suffix == ".json":
            found[name] = _steady(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().split("\n") if line]
            found[name] = [_steady(row) for row in rows]
        elif path.suffix == ".safetensors":
            found[name] = tensors_of(path)
        elif path.suffix in (".journal", ".html", ".md"):
            found[name] = "there"
        else:
            found[name] = path.read_bytes()
    return found


def tensors_of(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, bytes]]]:
    """Return the metadata, which have no order in the file, and type and bytes of each tensor."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        described = file.metadata() or {}
    return described, {
        name: (
            f"{t.dtype}{list(t.shape)}",
            t.contiguous().flatten().view(torch.uint8).numpy().tobytes(),
        )
        for name, t in tensors.items()
    }


def _steady(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _steady(value) for key, value in data.items() if key not in _VOLATILE}
    return [_steady(value) for value in data] if isinstance(data, list) else data


def order_of(out: Path) -> list[str]:
    """Return the stages of a finished run in the order in which they first wrote."""
    times: dict[str, float] = {}
    for path in out.rglob("*"):
        stage = stage_of(str(path.relative_to(out)))
        if stage is not None and path.is_file():
            times[stage] = min(times.get(stage, path.stat().st_mtime), path.stat().st_mtime)
    return sorted(times, key=lambda stage: times[stage])


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Name the files in which two outcomes differ."""
    names = sorted({*found, *wanted})
    return [name for name in names if found.get(name) != wanted.get(name)]


@contextmanager
def set_aside(folder: Path) -> Iterator[None]:
    """Give a folder back as it was: what runs in it meanwhile has the same path. It nests."""
    kept = Path(tempfile.mkdtemp(prefix=f"{folder.name}.kept-", dir=folder.parent))
    shutil.copytree(folder, kept, symlinks=True, dirs_exist_ok=True)
    try:
        yield
    finally:
        shutil.rmtree(folder)
        kept.rename(folder)
