"""Where trials are kept: a journal file, a database, or memory, opened as an Optuna storage."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from elastune.errors import BadRecipe
from elastune.seals import with_checksum, without_checksum

_POSTGRES = re.compile(r"postgres(ql)?://")
_ATTEMPTS = 5  # of making the tables, which workers that start together do at once
_BLOCK = 65536


@dataclass(frozen=True)
class Opened:
    """A storage.

    Attributes:
        storage: Optuna's.
        name: for messages, without a password.
        way_out: for messages: how to begin anew.
        shared: whether other processes can see it.
        close: gives connections back.
    """

    storage: BaseStorage
    name: str
    way_out: str
    shared: bool
    close: Callable[[], None]


def open_storage(storage: Path | str | None) -> Opened:
    """Open a journal file by its path, a database by its URL, or memory for None.

    Raises:
        BadRecipe: a database that cannot be reached, or whose driver is missing.
        ValueError, LookupError, TypeError, AttributeError, AssertionError: a corrupt journal.
    """
    if storage is None:
        return Opened(InMemoryStorage(), "memory", "", False, lambda: None)
    if isinstance(storage, str) and "://" in storage:
        return _database(storage)
    path = Path(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    journal = JournalStorage(JournalFile(path))
    return Opened(journal, f"search journal {path}", "delete it", True, lambda: None)


# --- journal files --------------------------------------------------------------------------------


class JournalFile(JournalFileBackend):
    """Optuna's journal file, written under a lock that is gone with the process that holds it.

    A worker that is killed while it writes then stops nobody, and the unfinished line that it
    leaves is cut off before the next one would be glued to it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path
        with _locked(path) as file:
            _cut_torn_line(file)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write one line for each record, with its checksum; wait until they are on the disk."""
        rows = map(with_checksum, logs)
        lines = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        with _locked(self.path) as file:
            _cut_torn_line(file)
            file.write(lines.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Yield the records from a number on.

        Raises:
            ValueError: a line was damaged; it is named.
        """
        number = log_number_from
        try:
            for row in super().read_logs(log_number_from):
                number += 1
                yield without_checksum(row)
        except ValueError as error:
            raise ValueError(f"line {number or 1} or the next is damaged: {error}") from error


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Open the file to append to it, while no other worker does."""
    with path.open("a+b") as file:
        if sys.platform == "win32":
            lock = JournalFileOpenLock(str(path))
            lock.acquire()
            try:
                yield cast(BinaryIO, file)
            finally:
                lock.release()
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)  # released by closing the file
            yield cast(BinaryIO, file)


def _cut_torn_line(file: BinaryIO) -> None:
    """Cut off a last line that a kill left unfinished."""
    size = file.seek(0, os.SEEK_END)
    tail = b""
    while len(tail) < size and b"\n" not in tail:
        start = max(0, size - len(tail) - (_BLOCK if tail else 1))
        file.seek(start)
        tail = file.read(size - len(tail) - start) + tail
    torn = tail[tail.rfind(b"\n") + 1 :]
    if torn and b'{"op_code"'.startswith(torn[:10]):
        file.truncate(size - len(torn))


# --- databases ------------------------------------------------------------------------------------


def _database(url: str) -> Opened:
    """Open a database, and make Optuna's tables in it where there are none."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import ArgumentError, DBAPIError

    shown = _without_password(url)
    options: dict[str, Any] = {"pool_pre_ping": True}  # servers drop what long trials leave idle
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": 60}  # seconds to wait for other writers
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            # Optuna fills in its schema's version between braces.
            plain = _with_driver(url).replace("{", "{{").replace("}", "}}")
            database = RDBStorage(plain, engine_kwargs=options)
            break
        except (ImportError, ArgumentError) as error:
            raise _no_driver(shown, error) from None
        except (DBAPIError, StorageInternalError) as error:
            # Those that start together make the same tables; one of them is the first.
            if attempt == _ATTEMPTS or _is_unreachable(error):
                raise BadRecipe(
                    f"cannot search in the database {shown}: {_cause(error)}",
                    try_="start the server, or correct the URL "
                    "(postgresql://user:password@host/database)",
                ) from None
            time.sleep(random.random() / 2)

    def close() -> None:
        database.remove_session()
        database.engine.dispose()

    way_out = "another study, or another database"
    return Opened(get_storage(database), f"database {shown}", way_out, True, close)


def _with_driver(url: str) -> str:
    """Name psycopg 3 as PostgreSQL's driver where it is the one that is installed."""
    if not _POSTGRES.match(url):
        return url
    has = importlib.util.find_spec
    driver = "psycopg2" if has("psycopg2") and not has("psycopg") else "psycopg"
    return _POSTGRES.sub(f"postgresql+{driver}://", url, count=1)


def _no_driver(shown: str, error: Exception) -> BadRecipe:
    if shown.startswith("postgres"):
        return BadRecipe(
            f"searching in {shown} needs a driver for PostgreSQL",
            try_="pip install elastune[postgres]",
        )
    return BadRecipe(
        f"cannot search in {shown}: {error}",
        try_="a file path, postgresql://user:password@host/database, or sqlite:///file",
    )


def _is_unreachable(error: Exception) -> bool:
    """Tell whether there is no connection at all, so that trying again at once is in vain."""
    busy = ("already exists", "locked")
    return type(error).__name__ == "OperationalError" and not any(b in str(error) for b in busy)


def _cause(error: Exception) -> str:
    """Return the first line of what the database said."""
    told = getattr(error, "orig", None) or getattr(error.__cause__, "orig", None) or error
    return str(told).strip().partition("\n")[0]


def _without_password(url: str) -> str:
    return re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url)
