"""Rows of tables and parquet; what is torn or ambiguous is named by file and line."""

from __future__ import annotations

import csv
import gzip
import io
import sys

import pytest

from elastune.errors import BadData
from elastune.tasks.sources import local_file, read_rows

VALUES = [
    {"text": 'He said "no, never".', "label": "1"},
    {"text": "two\nlines, one cell", "label": "0"},
    {"text": "ünï\u2028code\t", "label": ""},
]


def table(path, rows, delimiter=",", mark=""):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    content = (mark + file.getvalue()).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.tsv", "rows.tsv.gz"])
def test_quoted_cells_are_read_as_they_were_written(tmp_path, name):
    path = table(tmp_path / name, VALUES, delimiter="\t" if "tsv" in name else ",")
    assert [row.values for row in read_rows(path)] == VALUES


def test_byte_order_mark_of_a_spreadsheet_is_no_part_of_a_name(tmp_path):
    path = table(tmp_path / "rows.csv", VALUES, mark="\ufeff")
    assert list(read_rows(path)[0].values) == ["text", "label"]


def test_tables_equal_what_pandas_reads(tmp_path):
    pandas = pytest.importorskip("pandas")
    path = table(tmp_path / "rows.csv", VALUES)
    frame = pandas.read_csv(path, dtype=str, keep_default_na=False)
    assert [row.values for row in read_rows(path)] == frame.to_dict("records")


def test_parquet_keeps_numbers_lists_and_objects(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = [
        {"text": "a", "label": 3, "choices": ["x", "y"], "answers": {"text": ["a"], "at": [0]}},
        {"text": None, "label": 4, "choices": [], "answers": {"text": [], "at": []}},
    ]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(values), path)
    rows = read_rows(path)
    assert [row.values for row in rows] == values
    with pytest.raises(BadData, match=r"rows\.parquet row 1: field 'text' is None"):
        rows[1].text("text")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,1\nb\n", "line 3 has 1 cells; the first line names 2 columns"),
        ("text,label\na,1,2\n", "line 2 has 3 cells"),
        ("text,text\na,1\n", "names a column twice"),
        ("text,label\n", "holds no rows"),
        ("", "holds no rows"),
        ("text\n" + "a" * 200_000, "line 2 cannot be read: field larger"),
    ],
)
def test_torn_tables_are_named_by_file_and_line(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BadData, match=message) as caught:
        read_rows(path)
    assert "rows.csv" in str(caught.value)


def test_blank_lines_of_a_table_are_no_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n\na,1\n\n", encoding="utf-8")
    (row,) = read_rows(path)
    assert row.values == {"text": "a", "label": "1"}
    assert row.place.endswith("line 3")


def test_damaged_or_missing_parquet_is_bad_data(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    with pytest.raises(BadData, match=r"there is no file .*rows\.parquet"):
        read_rows(path)
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(BadData, match="cannot be read as parquet"):
        read_rows(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadData, match=r"pip install 'elastune\[data\]'"):
        read_rows(path)


def test_split_of_a_folder_is_found_by_name_whatever_its_suffix(tmp_path):
    assert local_file(tmp_path, "validation", "heldout") is None
    (tmp_path / "heldout.csv").write_text("a\n1\n", encoding="utf-8")
    assert local_file(tmp_path, "validation", "heldout") == tmp_path / "heldout.csv"
    (tmp_path / "validation.parquet").write_bytes(b"")
    assert local_file(tmp_path, "validation", "heldout") == tmp_path / "validation.parquet"
    assert local_file(tmp_path / "none", "validation") is None
