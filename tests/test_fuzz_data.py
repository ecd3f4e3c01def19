"""Fuzz: a user's own data in every format, and every kind of task that reads it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from fuzzing import Outcomes, changed, damaged, json_bytes, tiers
from hypothesis import given
from hypothesis import strategies as st

from elastune.tasks import get_task
from elastune.tasks.sources import read_rows

ROWS: dict[str, list[dict[str, Any]]] = {
    "custom": [{"prompt": f"What is {n} + 1?", "completion": str(n + 1)} for n in range(6)],
    "classification": [{"text": f"text {n}", "label": n % 2} for n in range(6)],
    "regression": [{"text": f"text {n}", "label": n / 2} for n in range(6)],
    "multiple_choice": [
        {"question": f"which {n}?", "choices": ["a", "b", "c"], "answer": n % 3} for n in range(6)
    ],
    "extractive_qa": [
        {
            "question": f"who {n}?",
            "context": f"it was Ann {n}",
            "answers": {"text": ["Ann"], "answer_start": [7]},
        }
        for n in range(6)
    ],
}
CHAT = [
    {"messages": [{"role": "user", "content": f"hi {n}"}, {"role": "assistant", "content": "yo"}]}
    for n in range(3)
]


def as_lines(rows: Any) -> bytes:
    return b"\n".join(map(json_bytes, rows)) if isinstance(rows, list) else json_bytes(rows)


def as_table(rows: Any, delimiter: str) -> bytes:
    file = io.StringIO()
    plain = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    writer = csv.writer(file, delimiter=delimiter)
    for row in plain[:1]:
        writer.writerow(row)
    for row in plain:
        writer.writerow([v if isinstance(v, str) else json.dumps(v) for v in row.values()])
    return file.getvalue().encode("utf-8", "surrogatepass")


WRITERS = {
    ".jsonl": as_lines,
    ".json": json_bytes,
    ".csv": lambda rows: as_table(rows, ","),
    ".tsv": lambda rows: as_table(rows, "\t"),
    ".jsonl.gz": lambda rows: gzip.compress(as_lines(rows)),
}


@st.composite
def files(draw: Any) -> tuple[str, str, bytes]:
    """Return a task, a suffix, and what a file of it holds."""
    task = draw(st.sampled_from(sorted(ROWS)))
    rows = CHAT if task == "custom" and draw(st.booleans()) else ROWS[task]
    suffix = draw(st.sampled_from(sorted(WRITERS)))
    content = WRITERS[suffix](draw(changed(rows, most=3)))
    return task, suffix, draw(damaged(content)) if draw(st.booleans()) else content


@tiers(60)
def test_any_file_of_rows_is_read_or_refused(tmp_path: Path, tier: Any) -> None:
    outcomes = Outcomes()

    def use(task: str, path: Path) -> None:
        made = get_task(f"{task}:{path}", holdout=0.5)
        made.train_examples()
        made.report_examples()

    @tier
    @given(files())
    def check(file: tuple[str, str, bytes]) -> None:
        task, suffix, content = file
        path = tmp_path / f"rows{suffix}"
        path.write_bytes(content)
        outcomes.of(lambda: use(task, path))
        outcomes.of(lambda: read_rows(path))

    check()
    outcomes.both()


@tiers(40, 0.7)
def test_any_parquet_file_is_read_or_refused(tmp_path: Path, tier: Any) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    outcomes, path = Outcomes(), tmp_path / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist(ROWS["custom"]), path, compression="gzip")
    valid = path.read_bytes()
    footer = valid[-700:]
    near = damaged(footer).map(lambda tail: valid[: -len(footer)] + tail)

    @tier
    @given(st.one_of(near, damaged(valid)))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        outcomes.of(lambda: read_rows(path))

    check()
    outcomes.both()


OPTIONS: dict[str, Any] = {
    "fields": {"prompt": "question"},
    "labels": ["no", "yes"],
    "holdout": 0.5,
}
OPTIONS |= {"match": "number", "report": "r.jsonl", "max_new_tokens": 8, "split": "train"}


@tiers(60)
def test_any_options_of_a_task_are_taken_or_refused(tmp_path: Path, tier: Any) -> None:
    outcomes = Outcomes()
    for task, rows in ROWS.items():
        (tmp_path / f"{task}.jsonl").write_bytes(as_lines(rows))

    def use(task: str, options: dict[str, Any]) -> None:
        made = get_task(f"{task}:{tmp_path / task}.jsonl", **options)
        made.train_examples()
        made.report_examples()

    some = st.dictionaries(st.sampled_from(sorted(OPTIONS)), st.none(), max_size=2)
    near = some.flatmap(lambda keys: changed({key: OPTIONS[key] for key in keys}, most=3))

    @tier
    @given(st.sampled_from(sorted(ROWS)), near.filter(lambda found: isinstance(found, dict)))
    def check(task: str, options: dict[str, Any]) -> None:
        outcomes.of(lambda: use(task, options))

    check()
    outcomes.both()
