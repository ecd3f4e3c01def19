"""The report on tasks of every kind: columns, paired verdicts, fine-tuning runs, predictions."""

from __future__ import annotations

import io
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from test_report import metric_row, metrics_of, read_page, write_json, write_rows

from elastune import statistics
from elastune.errors import BadArtifact
from elastune.metrics import METRICS, Record
from elastune.report import markdown_table, metrics_table
from elastune.report.load import kind_of, load_run, prediction_name
from elastune.report.results import AVERAGE, Column, systems, with_average
from elastune.report.verdicts import verdicts
from elastune.statistics import compare, stderr


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """What p-values and intervals are is tested elsewhere; here they only have to be the same."""
    monkeypatch.setattr(statistics, "PERMUTATIONS", 199)
    monkeypatch.setattr(statistics, "RESAMPLES", 100)


SYSTEMS = {"dense": 0.5, "dense+full": 0.9, "dense+lora": 0.85}


def classes(rng: random.Random, n: int, right: float) -> list[Record]:
    rows = []
    for index in range(n):
        gold = index % 3 % 2
        told = gold if rng.random() < right else 1 - gold
        row = {"index": index, "text": f"first text {index}", "text_pair": f"second {index}"}
        logits = [rng.random(), rng.random() + 2 * told]
        row |= {"prediction": told, "gold": gold, "correct": told == gold, "logits": logits}
        rows.append(row)
    return rows


def numbers(rng: random.Random, n: int, right: float) -> list[Record]:
    return [
        {
            "index": index,
            "text": f"text {index}",
            "prediction": index % 26 / 5 + rng.gauss(0, 4 * (1 - right)),
            "gold": index % 26 / 5,
        }
        for index in range(n)
    ]


def choices(rng: random.Random, n: int, right: float) -> list[Record]:
    rows = []
    for index in range(n):
        gold = index % 3
        told = gold if rng.random() < right else (gold + 1) % 3
        values = [-9.5 if place == told else -12.25 for place in range(3)]
        row = {"index": index, "prompt": f"Which of {index}?", "choices": [" a", " b", " c"]}
        row |= {"loglikelihoods": values, "gold": gold, "prediction": told}
        row |= {"prediction_norm": gold, "correct": told == gold, "correct_norm": True}
        rows.append(row)
    return rows


def spans(rng: random.Random, n: int, right: float) -> list[Record]:
    rows = []
    for index in range(n):
        exact = rng.random() < right
        row = {"index": index, "id": f"q{index}", "question": f"Who is number {index}?"}
        row |= {"context": "Long ago " * 60 + f"Ada {index} wrote it. " + "Much later " * 60}
        told = f"Ada {index}" if exact else "Ada"
        row |= {"prediction": told, "gold": [f"Ada {index}", f"Ada {index}"]}
        rows.append(row | {"exact": exact, "f1": 1.0 if exact else 2 / 3})
    return rows


def texts(rng: random.Random, n: int, right: float) -> list[Record]:
    rows = []
    for index in range(n):
        told = index + 1 if rng.random() < right else index
        row = {"index": index, "prompt": f"{index} and one?", "text": f"It is {told}."}
        row |= {"extracted": str(told), "gold": str(index + 1)}
        rows.append(row | {"correct": told == index + 1})
    return rows


def windows(rng: random.Random, n: int, right: float) -> list[Record]:
    return [
        {"index": i, "nll": 511 * (4 - right + rng.gauss(0, 0.2)), "tokens": 511} for i in range(n)
    ]


TASKS: dict[str, tuple[Callable[..., list[Record]], tuple[str, ...], int]] = {
    "mrpc": (classes, ("f1", "accuracy"), 400),
    "cola": (classes, ("matthews",), 300),
    "stsb": (numbers, ("pearson", "spearman"), 150),
    "piqa": (choices, ("accuracy", "accuracy_norm"), 200),
    "squad": (spans, ("token_f1", "exact_match"), 120),
    "gsm8k": (texts, ("accuracy",), 100),
    "wikitext2": (windows, ("perplexity",), 80),
}


def row_of(name: str, task: str, records: list[Record], metrics: tuple[str, ...]) -> dict[str, Any]:
    """A row of metrics.json as an evaluation makes it of its records."""
    parts = []
    for metric in (METRICS[m] for m in metrics):
        n = len(records) if metric.count is None else sum(r[metric.count] for r in records)
        score = metric.value(*metric.arrays(records))
        error = stderr(metric, records)
        parts.append({"metric": metric.name, "score": score, "stderr": error, "n": n})
    first, *others = parts
    return metric_row(name, 0.0, task=task, other_metrics=others) | first


def make_finetune(run: Path, tasks: tuple[str, ...] = tuple(TASKS)) -> Path:
    """A run of plain fine-tuning, scored on tasks of all kinds."""
    rows = []
    for place, task in enumerate(tasks):
        make, metrics, n = TASKS[task]
        for system, right in SYSTEMS.items():
            records = make(random.Random(f"{place} {system}"), n, right)
            write_rows(run / f"predictions/{system}.{prediction_name(task)}.jsonl", records)
            rows.append(row_of(system, task, records, metrics))
    write_json(run / "metrics.json", metrics_of(*rows))
    recipe = {"method": "finetune", "model": "acme/encoder", "task": tasks[0]}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"baselines": list(SYSTEMS)}))
    stage = {"status": "done", "input_hash": "ab", "seconds": 12.3}
    write_json(run / "manifest.json", {"schema": 1, "stages": {"evaluate": stage}})
    for name in ("dense-full", "dense-lora"):
        steps = [{"step": step, "loss": 2 / step} for step in range(1, 50)]
        write_rows(run / f"baselines/{name}/train.jsonl", steps)
    return run


# -- columns -------------------------------------------------------------------------------------


def test_further_metrics_of_a_task_are_further_columns_in_their_own_units() -> None:
    others = [{"metric": "spearman", "score": 0.8712, "stderr": 0.0123, "n": 400}]
    rows = [
        metric_row("sparse", -0.0345, task="stsb", metric="pearson", other_metrics=others),
        metric_row("sparse", 0.41, task="wikitext2", metric="perplexity"),
    ]
    table = markdown_table(metrics_of(*rows))
    assert (
        "stsb (pearson ↑, n = 400) | stsb (spearman ↑, n = 400) | wikitext2 (perplexity ↓" in table
    )
    assert f"{chr(0x2212)}0.035 ± 0.020 | 0.871 ± 0.012" in table


@pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))
def test_units_and_directions_are_those_of_the_metrics(metric: Any) -> None:
    column = Column("task", metric.name)
    assert column.higher_is_better == metric.higher_is_better
    assert column.percent == (metric.unit == "fraction")
    assert (column.decimals == 3) == (metric.unit == "correlation")


@pytest.mark.parametrize(
    ("metric", "higher", "percent"),
    [
        ("exact_match (flexible-extract)", True, True),
        ("word_perplexity", False, False),
        ("bits_per_byte", False, False),
        ("character_f", True, False),
    ],
)
def test_metrics_of_the_harness_are_understood_by_name(
    metric: str, higher: bool, percent: bool
) -> None:
    column = Column("lm-eval:gsm8k", metric)
    assert (column.higher_is_better, column.percent) == (higher, percent)


def test_the_average_is_over_first_metrics_of_the_runs_own_tasks() -> None:
    accuracy = [{"metric": "accuracy", "score": 1.0, "stderr": 0.1, "n": 9}]
    rows = [
        metric_row("best", 0.2, task="a"),
        metric_row("best", 0.4, task="b"),
        metric_row("best", 0.9, task="mrpc", metric="f1", other_metrics=accuracy),
        metric_row("best", 0.8, task="lm-eval:a"),
    ]
    (best,) = with_average(systems(metrics_of(*rows)))
    assert best.values[AVERAGE].score == pytest.approx(0.3)
    assert best.values[Column("mrpc", "accuracy")].score == 1.0


def test_an_unknown_standard_error_is_left_out() -> None:
    row = metric_row("dense", 0.5, task="cola", metric="matthews", stderr=math.nan)
    assert "| 0.500 |" in markdown_table(metrics_of(row))


def test_notes_of_a_task_become_footnotes(tmp_path: Path) -> None:
    note = "held out of <train>"
    rows = [
        metric_row("dense", 0.5, task="qqp", notes=note),
        metric_row("dense", 0.5, task="mnli", notes=note),
        metric_row("dense", 0.5, task="sst2", notes=None),
    ]
    metrics = metrics_of(*rows)
    table = markdown_table(metrics)
    assert "qqp¹ (" in table
    assert "mnli¹ (" in table
    assert "sst2 (" in table
    assert f"¹ {note}" in table
    assert note in str(metrics_table(metrics).caption)
    write_json(tmp_path / "metrics.json", metrics)
    assert f"¹ {note}" in read_page(tmp_path).text


def test_impossible_further_metrics_are_refused() -> None:
    for other, told in (
        ({"metric": "f1", "score": 88.0, "stderr": None, "n": 5}, r"0\.\.1, got 88"),
        ({"metric": "f1", "score": 0.5, "stderr": None}, "'n' is missing"),
    ):
        with pytest.raises(BadArtifact, match=told):
            systems(metrics_of(metric_row("dense", 0.5, other_metrics=[other])))


# -- verdicts ------------------------------------------------------------------------------------


def records_of(right: list[bool]) -> list[Record]:
    return [
        {"index": i, "prompt": "?", "text": "", "gold": "", "correct": correct}
        for i, correct in enumerate(right)
    ]


def paired_run(run: Path, ours: list[bool], theirs: list[bool]) -> Path:
    rows = []
    for name, right in (("best", ours), ("sparse+lora", theirs)):
        records = records_of(right)
        write_rows(run / f"predictions/{name}.lm-eval_a_b.jsonl", records)
        rows.append(row_of(name, "lm-eval:a/b", records, ("accuracy",)))
    write_json(run / "metrics.json", metrics_of(*rows))
    return run


def test_a_small_difference_on_the_same_examples_counts_when_pairs_show_it(tmp_path: Path) -> None:
    # 8 of 200 better and none worse: the two standard errors alone would hide it.
    theirs = [index % 2 == 0 for index in range(200)]
    ours = [index % 2 == 0 or index < 16 for index in range(200)]
    run = load_run(paired_run(tmp_path, ours, theirs))
    assert run.metrics is not None
    (unpaired,) = verdicts(systems(run.metrics))
    assert (unpaired.word, unpaired.paired) == ("within noise", None)
    (paired,) = verdicts(systems(run.metrics), run.predictions)
    assert paired.word == "better"
    expected = compare(METRICS["accuracy"], records_of(ours), records_of(theirs))
    assert paired.paired == expected
    text = read_page(tmp_path).text
    assert re.search(r"better \+4\.0 \[\+0\.9, \+7\.0\] paired, n = 200, p = 0\.008", text)
    assert "McNemar's exact test" in text
    assert "Unpaired:" not in text


@pytest.mark.parametrize("damage", ["lost", "stale", "other examples"])
def test_without_matching_records_the_comparison_is_unpaired(tmp_path: Path, damage: str) -> None:
    right = [index % 3 > 0 for index in range(60)]
    paired_run(tmp_path, right, right[::-1])
    path = tmp_path / "predictions/best.lm-eval_a_b.jsonl"
    if damage == "lost":
        path.unlink()
    elif damage == "stale":
        write_rows(path, records_of([not correct for correct in right]))
    else:
        write_rows(path, [row | {"gold": "other"} for row in records_of(right)])
    run = load_run(tmp_path)
    (verdict,) = verdicts(systems(run.metrics or {}), run.predictions)
    assert verdict.paired is None
    text = read_page(tmp_path).text
    assert "unpaired" in text
    assert "Paired:" not in text


def test_every_kind_of_task_is_compared_on_its_examples(tmp_path: Path) -> None:
    run = load_run(make_finetune(tmp_path))
    found = verdicts(with_average(systems(run.metrics or {})), run.predictions)
    named = {(v.name, v.reference, v.column.task): v for v in found}
    assert all(v.paired is not None for v in found if v.column != AVERAGE)
    for task, (_, metrics, _) in TASKS.items():
        sides = [run.predictions[name, task] for name in ("dense+full", "dense")]
        expected = compare(METRICS[metrics[0]], *sides)
        assert named["dense+full", "dense", task].paired == expected
        assert named["dense+full", "dense", task].word == "better"
        assert ("dense+lora", "dense+full", task) in named


# -- fine-tuning ---------------------------------------------------------------------------------


def test_a_run_of_baselines_alone_reads_as_a_whole(tmp_path: Path) -> None:
    page = read_page(make_finetune(tmp_path))
    assert "finetune · acme/encoder" in page.text
    assert re.search(
        r"dense\+full reaches [\d.]+ ± [\d.]+ % F1 on mrpc, better than dense", page.text
    )
    assert "Different from dense beyond noise?" in page.text
    assert "Different from dense+full beyond noise?" in page.text
    for absent in ("Not in this report", "Sub-networks", "sub-network", "Unstructured zeros"):
        assert absent not in page.text
    for part in ("Training loss", "Predictions", "Bold: best system", "MACs are"):
        assert part in page.text
    names = [cells[0] for cells in page.cells if len(cells) > 8]
    assert names[:4] == ["system", "dense", "dense+full", "dense+lora"]


def test_a_fine_tuning_run_that_lacks_a_curve_says_so(tmp_path: Path) -> None:
    run = make_finetune(tmp_path, ("gsm8k",))
    (run / "baselines/dense-full/train.jsonl").unlink()
    text = read_page(run).text
    assert "Not in this report" in text
    assert "baselines/dense-full/train.jsonl" in text
    assert "space.json" not in text


def test_the_best_of_baselines_alone_is_bold(tmp_path: Path) -> None:
    metrics = metrics_of(metric_row("dense", 0.1), metric_row("dense+full", 0.36))
    table = markdown_table(metrics)
    assert "| dense+full | **36.0 ± 2.0**" in table
    assert "(baseline)" not in table


def test_one_system_alone_is_compared_with_nothing(tmp_path: Path) -> None:
    write_json(tmp_path / "metrics.json", metrics_of(metric_row("dense", 0.1)))
    text = read_page(tmp_path).text
    assert "beyond noise" not in text
    assert "cannot be told" not in text


# -- predictions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_records_of_every_kind_are_shown_with_their_count(tmp_path: Path, task: str) -> None:
    make, _, n = TASKS[task]
    run = make_finetune(tmp_path, (task,))
    page = read_page(run)
    rows = load_run(run).predictions["dense+full", task]
    right = sum(bool(row.get("correct", row.get("exact"))) for row in rows)
    expected = f"{right} right of {n}"
    if make is windows:
        expected = f"{511 * n:,} tokens in {n} windows"
    if make is numbers:
        errors = [abs(row["prediction"] - row["gold"]) for row in rows]
        expected = f"mean absolute error {np.mean(errors):.3f} over {n}"
    assert f"dense+full on {task}: {expected}" in page.text
    assert make in (numbers, windows) or "wrong" in page.text


def test_a_confusion_matrix_counts_every_answer(tmp_path: Path) -> None:
    run = make_finetune(tmp_path, ("mrpc",))
    page = read_page(run)
    rows = load_run(run).predictions["dense", "mrpc"]
    head = next(place for place, cells in enumerate(page.cells) if cells[:1] == ["gold"])
    for gold in (0, 1):
        counts = [
            sum((r["gold"], r["prediction"]) == (gold, told) for r in rows) for told in (0, 1)
        ]
        shares = [f"{count:,} {100 * count / sum(counts):.0f} %" for count in counts]
        assert page.cells[head + 1 + gold] == [str(gold), *shares, str(sum(counts))]


def test_choices_show_what_was_chosen_and_what_is_right(tmp_path: Path) -> None:
    row = choices(random.Random(0), 1, 0.0)[0]
    write_rows(tmp_path / "predictions/dense.piqa.jsonl", [row])
    write_json(tmp_path / "metrics.json", metrics_of(metric_row("dense", 0.0, task="piqa")))
    text = read_page(tmp_path).text
    minus = chr(0x2212)
    assert f"{minus}12.25 a (gold) {minus}9.50 b (chosen) {minus}12.25 c" in text
    assert "0 right of 1, 1 by length" in text


def test_contexts_are_cut_around_the_answer(tmp_path: Path) -> None:
    (row,) = spans(random.Random(0), 1, 0.0)
    write_rows(tmp_path / "predictions/dense.squad.jsonl", [row])
    write_json(tmp_path / "metrics.json", metrics_of(metric_row("dense", 0.0, task="squad")))
    text = read_page(tmp_path).text
    assert "Ada 0 wrote it." in text
    assert text.count("Long ago") < 40
    assert "wrong, F1 67 %" in text


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "p", "text": "t", "extracted": "t", "gold": ["t"], "exact": 1.0},
        {"prompt": "p", "gold": "x", "choices": ["a", "b"], "loglikelihoods": [-1.5, -2.5]},
        {"prompt": "p", "gold": 0, "loglikelihoods": [-30.0], "word_perplexity": [-30.0, 9]},
        {"something": "else"},
    ],
)
def test_records_of_the_harness_and_of_no_known_kind_are_shown_too(
    tmp_path: Path, record: Record
) -> None:
    write_rows(tmp_path / "predictions/dense.lm-eval_x.jsonl", [{"index": 0} | record])
    write_json(tmp_path / "metrics.json", metrics_of(metric_row("dense", 0.5, task="lm-eval:x")))
    assert "dense on lm-eval:x: 1 " in read_page(tmp_path).text


def test_every_kind_is_told_by_its_records() -> None:
    kinds = [kind_of(make(random.Random(0), 1, 0.5)[0]) for make, _, _ in TASKS.values()]
    assert kinds == [
        *("classification", "classification", "regression", "multiple-choice"),
        *("question-answering", "generation", "perplexity"),
    ]


def test_a_page_of_many_long_answers_stays_below_two_megabytes(tmp_path: Path) -> None:
    rng = random.Random(0)
    names = ("dense", "dense+lora", "sparse", "sparse+lora", "largest", "heuristic", "best")
    rows = []
    for task in range(9):
        for name in names:
            make = (texts, spans, choices, numbers, classes)[task % 5]
            records = make(rng, 300, 0.5)
            for record in records:
                for field in ("prompt", "text", "question"):
                    if field in record:
                        record[field] += " & more" * 500
            write_rows(tmp_path / f"predictions/{name}.task{task}.jsonl", records)
            rows.append(metric_row(name, 0.5, task=f"task{task}"))
    write_json(tmp_path / "metrics.json", metrics_of(*rows))
    page = read_page(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
    for task in range(9):
        assert f"best on task{task}" in page.text


def test_text_of_records_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    for task, (make, _, _) in TASKS.items():
        record = json.loads(json.dumps(make(random.Random(0), 1, 0.0)[0]))
        for field, value in record.items():
            if isinstance(value, str):
                record[field] = evil
            elif isinstance(value, list) and isinstance(value[0], str):
                record[field] = [evil] * len(value)
        write_rows(tmp_path / f"predictions/{evil[1:7]}.{task}.jsonl", [record])
    write_json(tmp_path / "metrics.json", metrics_of(metric_row("dense", 0.5)))
    page = read_page(tmp_path)
    assert page.tags.count("script") == 1
    assert page.text.count("alert(1)") > 8


def test_many_tasks_stand_in_rows_of_a_narrow_terminal() -> None:
    cost = {"params": 10, "nonzero": 9, "macs": 8, "latency_ms": None, "config": None}
    rows = [
        {"name": name, "task": f"task_{i}", "metric": "accuracy", "score": i / 20, **cost}
        | {"stderr": 0.01, "n": 50, "seconds": 1.0, "other_metrics": []}
        for name in ("dense", "dense+lora")
        for i in range(12)
    ]
    console = Console(width=80, file=io.StringIO())
    console.print(metrics_table({"schema": 1, "rows": rows, "environment": {}}))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for i in range(12):
        (line,) = [line for line in text.splitlines() if f" task_{i} " in line]
        assert line.count(f"{5 * i:.1f} ± 1.0") == 2
