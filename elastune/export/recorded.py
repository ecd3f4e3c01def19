"""The files that an export recorded when it was written: none may be missing, none may change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from elastune.errors import BadArtifact, ElastuneError
from elastune.files import file_digest, refuse_outside


def refuse_missing(folder: Path, names: Iterable[str], *, try_: str = "export it again") -> None:
    """Make sure that files are there.

    Raises:
        BadArtifact: some are not; they are named.
    """
    names = list(names)
    refuse_outside(folder, names)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BadArtifact(f"{folder} lacks {', '.join(missing)}", try_=try_)


def refuse_changed(
    folder: Path, digests: Mapping[str, str], *, said: str, try_: str = "export it again"
) -> None:
    """Make sure that files have the SHA-256 digests they were written with.

    Raises:
        ElastuneError: some have not; they are named, and ``said`` follows.
    """
    refuse_outside(folder, digests)
    changed = [name for name, digest in digests.items() if file_digest(folder / name) != digest]
    if changed:
        raise ElastuneError(f"{', '.join(changed)} changed since {said}", try_=try_)
