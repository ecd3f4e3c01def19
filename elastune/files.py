"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from elastune.errors import BadArtifact
from elastune.json_text import parse_json

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_text(path: Path, text: str) -> None:
    """Write a file beside ``path`` and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` whose file takes its place when the block ends well.

    When the block raises, such as on a full disk, that file is deleted and ``path`` is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # never through a link that somebody put there
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        BadArtifact: missing or not JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadArtifact(f"{path} is missing", try_="run the stage that makes it") from None
    except (OSError, ValueError) as error:
        raise BadArtifact(
            f"{path} is corrupt: {error}", try_="delete it; the next run makes it again"
        ) from error


@contextlib.contextmanager
def holding(path: Path, *, try_: str | None = None) -> Iterator[None]:
    """Turn what readers raise over the values of a file into one message that names the file.

    Raises:
        BadArtifact: a field is missing, or of another kind or size than what is read it for.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise BadArtifact(
            f"{path} does not hold what it should: {type(error).__name__}: {str(error)[:200]}",
            try_=try_ or "delete it; what wrote it makes it again",
        ) from error


def refuse_outside(folder: Path, names: Iterable[Any]) -> None:
    """Make sure that names from a file are of files below ``folder``: none leads out of it.

    Raises:
        BadArtifact: a name that is absolute, has "..", or is no text.
    """
    for name in names:
        parts = Path(name).parts if isinstance(name, str) and "\0" not in name else ()
        if not parts or Path(name).is_absolute() or ".." in parts:
            raise BadArtifact(
                f"{str(name)[:80]!r} is no name of a file in {folder}",
                try_="copy or write that folder again",
            )


def refuse_links_outside(folder: Path) -> None:
    """Make sure that no link below ``folder`` leads out of it, so that none is written through.

    Raises:
        BadArtifact: one does; it is named.
    """
    home = folder.resolve()
    if home.parent.name == "snapshots":  # of the hub's cache, whose files are links to its blobs
        home = home.parent.parent
    for here, names, files in os.walk(folder):
        for name in [*names, *files]:
            path = Path(here, name)
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                raise BadArtifact(
                    f"{path} is a link to {os.readlink(path)}, outside of {folder}",
                    try_="put there what it leads to, or make the whole folder the link",
                )


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Delete a file or folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
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
    prefix = f".{target.name}.partial-"
    for stale in target.parent.glob(f"{glob.escape(prefix)}*"):  # of a killed process
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    temporary.chmod(0o755)  # mkdtemp's 0700 would make the result unreadable to others
    try:
        yield temporary
        _replace(target, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(target: Path, temporary: Path) -> None:
    """Put ``temporary`` in the place of ``target``; what was there ends up at ``temporary``."""
    if target.is_symlink():  # what it leads to is another's
        target.unlink()
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
