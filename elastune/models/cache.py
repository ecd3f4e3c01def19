"""The folder where converted models are kept, and building something in it exactly once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from elastune.errors import ElastuneError
from elastune.files import whole_folder


def cache_folder() -> Path:
    """Return ``$ELASTUNE_CACHE``, else ``$XDG_CACHE_HOME/elastune``, else ``~/.cache/elastune``."""
    own = os.environ.get("ELASTUNE_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "elastune"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return ``folder``, made by ``build(empty folder)`` if it is not there yet.

    Of several processes one builds and the others wait for it. A build that fails or is killed
    leaves no ``folder``.

    Raises:
        ElastuneError: the cache cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if folder.is_dir():
                return folder
            for left_by_a_kill in folder.parent.glob(f".{folder.name}.*"):
                shutil.rmtree(left_by_a_kill, ignore_errors=True)
            with whole_folder(folder) as temporary:
                build(temporary)
    except OSError as error:
        raise ElastuneError(
            f"the model cache {str(folder.parent)!r} cannot be written: {error}",
            try_="set ELASTUNE_CACHE to a folder with free space that you may write to",
        ) from error
    return folder
