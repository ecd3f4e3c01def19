"""The processes of one machine that search together: a GPU each, or a share of the processors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from elastune.run import Run


@dataclass(frozen=True)
class Place:
    """Where a worker computes.

    Attributes:
        gpu: as ``CUDA_VISIBLE_DEVICES`` names it; None where there is none.
        threads: that it computes with.
    """

    gpu: str | None
    threads: int


def places(count: int) -> list[Place]:
    """Return where ``count`` workers compute: GPU i modulo the number there are, by turns.

    The threads are an equal share of the processors this process may use, unless
    ``OMP_NUM_THREADS`` says how many.
    """
    gpus = visible_gpus()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(asked) if asked.isdecimal() else max(1, _processors() // count)
    return [Place(gpus[i % len(gpus)] if gpus else None, threads) for i in range(count)]


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    n = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(n)] if given is None else given.split(",")
    return [name.strip() for name in names][:n]


@contextmanager
def other_workers(run: Run) -> Iterator[None]:
    """Start all processes of a search but this one, its first, and see that none outlives it."""
    count = run.recipe.search.workers
    if count == 1:
        yield
        return
    own, *others = places(count)
    run.reporter.say(_told([own, *others]))
    command = [sys.executable, "-m", "elastune", "work", str(run.dir.root)]
    workers = [subprocess.Popen(command, env={**os.environ, **_variables(p)}) for p in others]
    threads = torch.get_num_threads()
    torch.set_num_threads(own.threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()


def _variables(place: Place) -> dict[str, str]:
    """Return what tells a process where to compute."""
    return {
        "CUDA_VISIBLE_DEVICES": place.gpu or "",
        "OMP_NUM_THREADS": str(place.threads),
    }


def _told(found: Sequence[Place]) -> str:
    where = [place.gpu for place in found if place.gpu is not None]
    on = f"on GPU {', '.join(where)}" if where else f"of {found[0].threads} threads"
    return f"{len(found)} workers {on}"


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):  # a scheduler may grant a job fewer than there are
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
