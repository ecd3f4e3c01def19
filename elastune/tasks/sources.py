"""Read rows from local files (jsonl, json, csv, tsv, parquet) and from the hub; plain text, too.

All but parquet may be gzipped.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TextIO, cast

from elastune.errors import BadData, nearest
from elastune.json_text import parse_json

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
TABLE_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
ROW_SUFFIXES = JSON_SUFFIXES + TABLE_SUFFIXES
TEXT_SUFFIXES = (".txt", ".txt.gz")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Row:
    """One record of a data set and where it stands, for messages.

    Attributes:
        values: field -> value.
        place: file and line, e.g. ``train.jsonl line 7``.
    """

    values: dict[str, Any]
    place: str

    def get(self, field: str, *, try_: str | None = None) -> Any:
        """Return the value of ``field``.

        Raises:
            BadData: the row lacks it (the message names the place and the fields present).
        """
        if field not in self.values:
            raise BadData(
                f"{self.place} has no field {field!r}{nearest(field, self.values)}; "
                f"fields present: {', '.join(map(repr, self.values)) or 'none'}.",
                try_=try_ or "name the fields of your data with the option `fields`",
            )
        return self.values[field]

    def text(self, field: str) -> str:
        """Return ``field`` as text; numbers are spelled out.

        Raises:
            BadData: the field is missing, null or not a string or number.
        """
        value = self.get(field)
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        raise BadData(f"{self.place}: field {field!r} is {value!r}; it must be a string or number.")


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, by its suffix.

    .jsonl has an object a line, .json a list of objects; .csv and .tsv name their columns in the
    first line and hold strings alone; .parquet needs the package pyarrow.

    Raises:
        BadData: no such file, not UTF-8 or gzip, bad JSON or a torn table row (with line number),
            a row that is no object, no row at all, or pyarrow is missing.
    """
    if path.suffix == ".parquet":
        rows = _rows_of_parquet(path)
    elif path.name.endswith(TABLE_SUFFIXES):
        rows = list(_rows_of_table(read_text(path), path))
    else:
        text = read_text(path)
        is_list = text.lstrip().startswith("[")
        rows = _rows_of_list(text, path) if is_list else list(_rows_of_lines(text, path))
    if not rows:
        raise BadData(f"{path} holds no rows.", try_="check that the file was written completely")
    return rows


def local_file(folder: Path, *names: str) -> Path | None:
    """Return the first file of ``folder`` called one of ``names``, with any suffix of rows."""
    paths = (folder / f"{name}{suffix}" for name in names for suffix in ROW_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def read_text(path: Path) -> str:
    """Return the text of a file, unpacked when its name ends in .gz.

    Raises:
        BadData: no such file, or it is not UTF-8 text or not valid gzip.
    """
    _require_file(path)
    try:
        with _open(path) as file:
            return file.read()
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise BadData(
            f"{path} cannot be read: {error}.", try_="store it as UTF-8 text, or gzip of it (.gz)"
        ) from error


def hub_rows(repo: str, *, split: str, subset: str | None = None) -> list[Row]:
    """Return the rows of one split of a data set of the Hugging Face hub.

    Raises:
        BadData: the `datasets` package is missing, or the data set cannot be had.
    """
    try:
        import datasets
    except ImportError as error:
        raise BadData(
            f"reading {repo} from the hub needs the package datasets.",
            try_="pip install 'elastune[data]'",
        ) from error
    try:
        loaded = datasets.load_dataset(repo, subset, split=split)
    except Exception as error:  # the hub client raises many unrelated classes
        raise BadData(
            f"the hub data set {repo} (subset {subset}, split {split}) cannot be loaded: {error}",
            try_="check its name and your connection, or give a folder of local data: data_dir",
        ) from error
    rows = [Row(dict(row), f"{repo} {split} row {i}") for i, row in enumerate(loaded)]
    if not rows:
        raise BadData(
            f"the hub data set {repo} (subset {subset}, split {split}) holds no rows.",
            try_="another split or subset",
        )
    return rows


def _require_file(path: Path) -> None:
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        where = "" if path.parent.is_dir() else f"; there is no folder {path.parent} either"
        raise BadData(f"there is no file {path}{nearest(path.name, siblings)}{where}.")


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8"))
    return path.open(encoding="utf-8")


def _rows_of_lines(text: str, path: Path) -> Iterator[Row]:
    # Not splitlines(): U+2028 and its kin may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            values = parse_json(line)
        except ValueError as error:
            raise BadData(
                f"{place} is not valid JSON: {_why(error)}.",
                try_="write one JSON object a line (.jsonl), or one list of objects (.json)",
            ) from error
        yield _row(values, place)


def _rows_of_list(text: str, path: Path) -> list[Row]:
    try:
        values = parse_json(text)
    except ValueError as error:
        line = f" line {error.lineno}" if isinstance(error, JSONDecodeError) else ""
        raise BadData(
            f"{path}{line} is not valid JSON: {_why(error)}.",
            try_="one JSON object a line, or a file with a list of them",
        ) from error
    return [_row(value, f"{path} item {i}") for i, value in enumerate(values, start=1)]


def _why(error: ValueError) -> str:
    if isinstance(error, JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error)


def _rows_of_table(text: str, path: Path) -> Iterator[Row]:
    # Spreadsheets put a byte order mark before the first column's name.
    file = io.StringIO(text.removeprefix("\ufeff"), newline="")
    reader = csv.reader(file, delimiter=_DELIMITERS[Path(path.name.removesuffix(".gz")).suffix])
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise BadData(
                f"{path} names a column twice in its first line: {', '.join(header)}.",
                try_="rename one of the two columns",
            )
        for cells in reader:
            place = f"{path} line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise BadData(
                    f"{place} has {len(cells)} cells; the first line names {len(header)} columns.",
                    try_='put cells that hold the delimiter, a quote or a line end in "quotes"',
                )
            yield Row(dict(zip(header, cells, strict=True)), place)
    except csv.Error as error:
        raise BadData(
            f"{path} line {reader.line_num} cannot be read: {error}.",
            try_="a table in UTF-8, every row with the columns of the first line",
        ) from error


def _rows_of_parquet(path: Path) -> list[Row]:
    _require_file(path)
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise BadData(
            f"reading {path} needs the package pyarrow.", try_="pip install 'elastune[data]'"
        ) from error
    try:
        values = parquet.ParquetFile(path).read().to_pylist()
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise BadData(
            f"{path} cannot be read as parquet: {error}.",
            try_="write the table again; .csv and .jsonl are read, too",
        ) from error
    return [_row(value, f"{path} row {i}") for i, value in enumerate(values)]


def _row(values: Any, place: str) -> Row:
    if not isinstance(values, dict):
        raise BadData(f"{place} is a {type(values).__name__}; every row must be a JSON object.")
    return Row(values, place)
