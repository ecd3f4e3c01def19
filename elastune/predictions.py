"""Records of an evaluation on disk: written as they come, so that a killed evaluation goes on.

While it runs, ``.<name>.partial`` beside the final file has a header line with the evaluation's key
and then one record a line, in the order of arrival. When all are there they are sorted into
``<name>``, one JSON object a line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from elastune.files import write_text
from elastune.metrics import Record
from elastune.seals import with_checksum, without_checksum


class PredictionFile:
    """Collects records in memory and, where a path is given, on disk.

    Args:
        path: of the final file; None keeps records in memory alone.
        key: of all that the records depend on; records of another key are thrown away.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.path = path
        self._key = key
        self.records: dict[int, Record] = {}
        self.seconds = 0.0
        self._file: TextIO | None = None
        if path is not None:
            self.partial = path.with_name(f".{path.name}.partial")
            self._read()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Accept records as long as the context lasts."""
        if self.path is None:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Rewritten without a line that a kill may have torn.
        header = {"evaluation": self._key, "seconds": round(self.seconds, 4)}
        lines = [header, *self.records.values()]
        write_text(self.partial, "".join(_line(with_checksum(line)) for line in lines))
        with self.partial.open("a", encoding="utf-8") as file:
            self._file = file
            try:
                yield
            finally:
                self._file = None

    def add(self, record: Record, seconds: float) -> None:
        """Keep a record, made ``seconds`` after the one before it."""
        self.records[record["index"]] = record
        self.seconds += seconds
        if self._file is not None:
            self._file.write(_line(with_checksum(record | {"seconds": round(seconds, 4)})))
            self._file.flush()

    def finish(self) -> list[Record]:
        """Return the records in the order of their index, and write them to ``path``."""
        ordered = [self.records[index] for index in sorted(self.records)]
        if self.path is not None:
            write_text(self.path, "".join(map(_line, ordered)))
            self.partial.unlink(missing_ok=True)
        return ordered

    def _read(self) -> None:
        """Take in what a killed evaluation of the same key left."""
        if not self.partial.is_file():
            return
        with self.partial.open(encoding="utf-8", errors="replace") as file:
            header = _parsed(file.readline())
            if header is None or header.get("evaluation") != self._key:
                return
            self.seconds = header.get("seconds", 0.0)
            for line in file:
                record = _parsed(line)
                if record is None or not isinstance(record.get("index"), int):
                    return  # torn by the kill, or damaged: it and what follows is asked again
                self.seconds += record.pop("seconds", 0.0)
                self.records[record["index"]] = record


def read_predictions(path: Path) -> list[Record]:
    """Return the records of a finished evaluation, in the order of the examples."""
    # Not splitlines(): U+2028 and its kin may stand inside a JSON string.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=True) + "\n"


def _parsed(line: str) -> Record | None:
    try:
        parsed = without_checksum(json.loads(line))
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) and line.endswith("\n") else None
