"""Digests of what was written, so that what changed since behind its back is never used unnoticed.

safetensors, JSON and lines of JSON have no checksums: a bit that flips on a disk or in a copy would
else be another weight, another loss, another figure in a table.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from elastune.errors import BadArtifact
from elastune.files import file_digest

CHECKSUM = "crc32"
"""Field of a line of JSON that holds the checksum of its other fields."""


def seal(root: Path, outputs: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of every file of some outputs, by its path below ``root``.

    Cards (``.md``), which people complete, and hidden files are left out. Reads about 1.5 GB a
    second.

    Args:
        root: that the paths are relative to.
        outputs: files and folders below it; those that are not there are left out.
    """
    return {
        file.relative_to(root).as_posix(): file_digest(file)
        for output in outputs
        for file in ([output] if output.is_file() else sorted(output.rglob("*")))
        if file.is_file() and file.suffix != ".md" and not file.name.startswith(".")
    }


def broken(root: Path, seals: Mapping[str, str]) -> list[str]:
    """Return the names in ``seals`` of files that are missing or have another content."""
    return [
        name
        for name, digest in seals.items()
        if not (root / name).is_file() or file_digest(root / name) != digest
    ]


class SealedFiles:
    """The files of a folder against their seals, each read once as long as it is not touched.

    Args:
        root: that names are relative to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._seen: dict[str, tuple[str, int, int, int] | None] = {}

    def check(self, maker: str, outputs: Iterable[Path], seals: Mapping[str, str]) -> None:
        """Read the files, and compare them with what they were.

        Args:
            maker: the stage that wrote them, for the message.
            outputs: that it wrote.
            seals: what `seal` returned then.

        Raises:
            BadArtifact: a file changed, or is gone; it is named.
        """
        unseen = {
            name: d for name, d in seals.items() if self._seen.get(name) != self._now(name, d)
        }
        for name in broken(self.root, unseen):
            path = self.root / name
            owner = next((o for o in outputs if path.is_relative_to(o)), path)
            how = "has changed since" if path.exists() else "is gone since"
            raise BadArtifact(
                f"{path} {how} {maker} wrote it: its content is not what the manifest says",
                try_=f"put it back, or delete {owner} and run again to make it anew",
            )
        self._seen |= {name: self._now(name, digest) for name, digest in unseen.items()}

    def _now(self, name: str, digest: str) -> tuple[str, int, int, int] | None:
        try:
            facts = (self.root / name).stat()
        except OSError:
            return None
        return digest, facts.st_mtime_ns, facts.st_size, facts.st_ino


def digest_of(data: Any) -> str:
    """Return the SHA-256 of JSON data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def check_rows(metrics: Mapping[str, Any], path: Path) -> None:
    """See that the rows of a ``metrics.json`` are those that were written, if it has their seal.

    Raises:
        BadArtifact: they are not.
    """
    if "seal" in metrics and metrics["seal"] != digest_of(metrics.get("rows")):
        raise BadArtifact(
            f"{path} is corrupt: its rows are not those that were written",
            try_="delete it; the next run scores its systems again",
        )


def with_checksum(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line's fields with their checksum behind them."""
    return {**row, CHECKSUM: _checksum(row)}


def without_checksum(row: Any) -> Any:
    """Return the fields of a line that was read, having compared them with their checksum.

    Lines without one, of earlier versions or other programs, are taken as they are.

    Raises:
        ValueError: they differ.
    """
    if not isinstance(row, dict) or CHECKSUM not in row:
        return row
    rest = {name: value for name, value in row.items() if name != CHECKSUM}
    if row[CHECKSUM] != _checksum(rest):
        raise ValueError("a line's content does not fit its checksum")
    return rest


def _checksum(row: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(row, sort_keys=True).encode())
