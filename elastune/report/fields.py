"""Read JSON and JSON Lines files, and check the fields of their rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from elastune.errors import BadArtifact
from elastune.json_text import parse_json

SCHEMA = 1
AGAIN = "run the stage that writes this file again: `elastune run` redoes what is missing"


def check_fields(row: Any, fields: Mapping[str, Any], where: str) -> None:
    """Check that ``row`` is an object with these fields of these types.

    Raises:
        BadArtifact: naming ``where`` and the field.
    """
    if not isinstance(row, Mapping):
        raise BadArtifact(f"{where}: expected an object, got {type(row).__name__}", try_=AGAIN)
    for name, kind in fields.items():
        if name not in row:
            raise BadArtifact(f"{where}: field {name!r} is missing", try_=AGAIN)
        _check_type(row[name], kind, f"{where}: field {name!r}")


def check_optional(row: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> None:
    """Check the types of those fields that ``row`` has; null counts as absent."""
    for name, kind in fields.items():
        if row.get(name) is not None:
            _check_type(row[name], kind, f"{where}: field {name!r}")


def _check_type(value: Any, kind: Any, where: str) -> None:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
        return
    allowed = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
    got = "null" if value is None else type(value).__name__
    raise BadArtifact(f"{where} must be {allowed}, got {got}", try_=AGAIN)


def read_text(path: Path) -> str | None:
    """Read a UTF-8 text file; None where there is no file."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise BadArtifact(f"{path} cannot be read: {error}", try_=AGAIN) from error


def read_json(path: Path) -> dict[str, Any] | None:
    """Read the object in a JSON file of this schema; None where there is no file.

    Raises:
        BadArtifact: not JSON, not an object, or written by another schema.
    """
    text = read_text(path)
    if text is None:
        return None
    try:
        value = parse_json(text)
    except ValueError as error:
        raise BadArtifact(f"{path} is not JSON: {error}", try_=AGAIN) from error
    if not isinstance(value, dict):
        raise BadArtifact(f"{path}: expected an object, got {type(value).__name__}", try_=AGAIN)
    if value.get("schema") != SCHEMA:
        raise BadArtifact(
            f"{path}: field 'schema' is {value.get('schema')!r}, this elastune reads {SCHEMA}",
            try_="use the elastune that wrote it, or run the stage again",
        )
    return value


def read_rows(path: Path, fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Read a JSON Lines file row by row; half a last line is taken as not yet written.

    Raises:
        BadArtifact: naming file, line and field.
    """
    # Not str.splitlines: generated text may hold U+2028, which JSON leaves as it is.
    lines = (read_text(path) or "").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            # A run that is going on, or was killed, may leave half a last line.
            if number == len(lines):
                return
            raise BadArtifact(f"{path}, line {number} is not JSON: {error}", try_=AGAIN) from error
        check_fields(row, fields, f"{path}, line {number}")
        yield row
