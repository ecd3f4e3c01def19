"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elastune.errors import BadArtifact

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_text(path: Path, text: str) -> None:
    """Write a file beside ``path`` and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        BadArtifact: missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadArtifact(f"{path} is missing", try_="run the stage that makes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadArtifact(
            f"{path} is corrupt: {error}", try_="delete it; the next run makes it again"
        ) from error


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Delete a file or folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty sibling that takes the place of ``folder`` when the block ends well.

    When the block raises, the sibling is deleted and ``folder`` is as it was. Callers see to it
    that one process at a time writes a folder.
    """
    target = Path(folder).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.*"):  # of a killed process
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    temporary.chmod(0o755)  # mkdtemp's 0700 would make the result unreadable to others
    try:
        yield temporary
        _replace(target, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(target: Path, temporary: Path) -> None:
    """Put ``temporary`` in the place of ``target``; what was there ends up at ``temporary``."""
    if not target.exists():
        temporary.rename(target)
    elif not _exchange(temporary, target):
        # Without an atomic exchange there is one instant with neither folder in place.
        aside = temporary.with_name(f"{temporary.name}.old")
        target.rename(aside)
        temporary.rename(target)
        shutil.rmtree(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step where the system can (Linux); return whether it did."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    names = os.fsencode(first), os.fsencode(second)
    return rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
