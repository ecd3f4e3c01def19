"""Who works on a trial, and whether that worker is still there."""

from __future__ import annotations

import functools
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

BEAT_SECONDS = 10.0
"""How often a worker gives a sign of life while it measures."""
GRACE_SECONDS = 60.0
"""A worker on another machine that gives none for this long is dead."""

_ACTIVE: set[str] = set()  # workers of this process


@dataclass(frozen=True)
class Worker:
    """One call of `elastune.search.search`.

    Attributes:
        machine: where process numbers are comparable: host, boot, and container.
        pid: of the process.
        started: when the process started, in seconds since the epoch.
        key: tells the searches of a process apart.
    """

    machine: str
    pid: int
    started: float
    key: str

    @classmethod
    def from_dict(cls, data: object) -> Worker | None:
        """Read what `to_dict` returned; None for anything else."""
        try:
            return cls(**data) if isinstance(data, Mapping) else None
        except TypeError:
            return None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def is_gone(self) -> bool | None:
        """Tell whether the worker is dead; None if it is of another machine."""
        if self.machine != machine():
            return None
        if self.pid == os.getpid():
            return self.key not in _ACTIVE
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            # Numbers are used again. Clocks that are set move the start by little.
            return abs(process.create_time() - self.started) > 5
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


@functools.cache
def machine() -> str:
    """Return what is the same for all processes that see each other's numbers."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:  # not Linux
        parts.append(str(int(psutil.boot_time())))
    return " ".join(parts)


@contextmanager
def at_work(beat: Callable[[], None] | None) -> Iterator[Worker]:
    """Be a worker, and call ``beat`` every `BEAT_SECONDS` from a thread of its own."""
    started = psutil.Process().create_time()
    worker = Worker(machine(), os.getpid(), started, uuid.uuid4().hex)
    _ACTIVE.add(worker.key)
    done = threading.Event()

    def beats() -> None:
        while beat is not None and not done.wait(BEAT_SECONDS):
            beat()

    thread = threading.Thread(target=beats, name="elastune-search-beat", daemon=True)
    thread.start()
    try:
        yield worker
    finally:
        done.set()
        thread.join()
        _ACTIVE.discard(worker.key)
