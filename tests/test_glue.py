"""GLUE: every split reads as the papers' tables need it; hidden labels are refused."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter

import pytest

from elastune.errors import BadData, BadRecipe
from elastune.tasks import get_task

LABELS = {"sst2": 2, "cola": 2, "mrpc": 2, "rte": 2, "qnli": 2, "qqp": 2, "mnli": 3, "mnli_mm": 3}
#: Complete official splits: (train, development). The others are samples.
OFFICIAL = {
    "sst2": (67349, 872),
    "cola": (8551, 1043),
    "mrpc": (3668, 408),
    "rte": (2490, 277),
    "stsb": (5749, 1500),
}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", OFFICIAL)
def test_complete_tasks_have_the_published_numbers_of_rows(data_dir, name):
    task = get_task(name, data_dir=data_dir)
    train, report = task.train_examples(), task.report_examples()
    assert (len(train), len(report)) == OFFICIAL[name]
    assert task.notes == ""
    if name != "stsb":
        assert {e.label for e in train} == {e.label for e in report} == {0, 1}
    else:
        assert min(e.label for e in train) == 0
        assert max(e.label for e in train) == 5


def test_development_sets_have_the_published_share_of_the_larger_class(data_dir):
    # Always answering the commoner class gives these accuracies in the GLUE literature.
    for name, share in {"mrpc": 0.684, "rte": 0.527, "sst2": 0.509, "qnli": 0.505}.items():
        report = get_task(name, data_dir=data_dir).report_examples()
        counts = Counter(example.label for example in report)
        assert max(counts.values()) / len(report) == pytest.approx(share, abs=5e-4)


def test_metrics_are_those_of_the_tables():
    names = {name: [m.name for m in get_task(name).metrics] for name in [*LABELS, "stsb"]}
    assert names == {
        "sst2": ["accuracy"],
        "cola": ["matthews", "accuracy"],
        "mrpc": ["f1", "accuracy"],
        "rte": ["accuracy"],
        "stsb": ["pearson", "spearman"],
        "qnli": ["accuracy"],
        "qqp": ["accuracy", "f1"],
        "mnli": ["accuracy"],
        "mnli_mm": ["accuracy"],
    }


@pytest.mark.parametrize("name", LABELS)
def test_classes_are_counted_and_named(name):
    task = get_task(name)
    assert task.kind == "classification"
    assert task.head == "sequence-classification"
    assert task.num_labels == len(task.labels) == LABELS[name]


def test_similarity_is_a_number():
    task = get_task("stsb")
    assert (task.kind, task.num_labels) == ("regression", 1)


@pytest.mark.parametrize("name", ["qqp", "mnli"])
def test_report_rows_held_out_of_train_are_announced(data_dir, name):
    task = get_task(name, data_dir=data_dir)
    assert len(task.report_examples()) in (1000, 4000)
    assert "not comparable with published figures" in task.notes


def test_official_split_beside_held_out_rows_goes_first(tmp_path):
    row = {"premise": "a", "hypothesis": "b", "label": 2}
    write_rows(tmp_path / "glue" / "mnli" / "heldout.jsonl", [row] * 3)
    matched = get_task("mnli", data_dir=tmp_path)
    mismatched = get_task("mnli_mm", data_dir=tmp_path)
    assert len(matched.report_examples()) == 3
    assert matched.notes
    with pytest.raises(BadData, match="finds no validation_mismatched split"):
        mismatched.report_examples()
    write_rows(tmp_path / "glue" / "mnli" / "validation_matched.jsonl.gz", [row])
    write_rows(tmp_path / "glue" / "mnli" / "validation_mismatched.jsonl", [row] * 2)
    assert len(matched.report_examples()) == 1
    assert len(mismatched.report_examples()) == 2
    assert matched.notes == mismatched.notes == ""


def test_pairs_keep_their_order_and_both_texts_make_the_key(tmp_path):
    row = {"question": "Who?", "sentence": "He did.", "label": 1, "idx": 7}
    write_rows(tmp_path / "glue" / "qnli" / "train.jsonl", [row])
    (example,) = get_task("qnli", data_dir=tmp_path).train_examples()
    assert (example.text, example.text_pair, example.label) == ("Who?", "He did.", 1)
    assert example.key == "Who?\nHe did."


def test_local_splits_may_be_tables(tmp_path):
    folder = tmp_path / "glue" / "sst2"
    folder.mkdir(parents=True)
    with (folder / "validation.tsv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("sentence", "label"), ("fine", "1")])
    (example,) = get_task("sst2", data_dir=tmp_path).report_examples()
    assert (example.text, example.text_pair, example.label) == ("fine", None, 1)


@pytest.mark.parametrize(
    ("name", "label", "message"),
    [
        ("rte", -1, "line 1: label -1 hides the gold answer"),
        ("stsb", -1, "line 1: label -1 hides the gold answer"),
        ("rte", 2, "label 2 is not one of 0 entailment, 1 not_entailment"),
        ("rte", 0.5, r"label 0\.5 is not one of"),
        ("stsb", 5.5, "label 5.5 is not between 0 and 5"),
        ("rte", "yes", "field 'label' is 'yes'; it must be a number"),
        ("stsb", float("nan"), "must be a number"),
        ("rte", True, "must be a number"),
    ],
)
def test_labels_that_are_none_are_refused_with_their_place(tmp_path, name, label, message):
    row = {"sentence1": "a", "sentence2": "b", "label": label}
    write_rows(tmp_path / "glue" / name / "train.jsonl", [row])
    with pytest.raises(BadData, match=message):
        get_task(name, data_dir=tmp_path).train_examples()


def test_hub_splits_are_the_official_ones(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(repo, subset, split):
        asked.append((repo, subset, split))
        return [{"premise": "p", "hypothesis": "h", "label": 1, "idx": 0}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("mnli", "mnli_mm"):
        assert get_task(name).train_examples()[0].text_pair == "h"
        assert get_task(name).report_examples()[0].label == 1
    assert asked == [
        ("nyu-mll/glue", "mnli", "train"),
        ("nyu-mll/glue", "mnli", "validation_matched"),
        ("nyu-mll/glue", "mnli", "train"),
        ("nyu-mll/glue", "mnli", "validation_mismatched"),
    ]


def test_plain_texts_take_no_prompt_template():
    with pytest.raises(BadRecipe, match="task 'sst2' takes no template, but 'qa' was given"):
        get_task("sst2", template="qa")
    assert get_task("sst2", template="none").name == "sst2"
    with pytest.raises(BadRecipe, match="has no option 'max_new_tokens'"):
        get_task("sst2", max_new_tokens=3)
