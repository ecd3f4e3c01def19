"""A user's own rows for every kind of head, from every kind of file."""

from __future__ import annotations

import csv
import json

import pytest

from elastune.errors import BadData, BadRecipe
from elastune.tasks import get_task


def write(path, rows):
    """Write ``rows`` in the format of the file's suffix."""
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            cells = [
                {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()}
                for row in rows
            ]
            writer.writerows(cells)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


SUFFIXES = ("jsonl", "csv", "tsv", "parquet")
REVIEWS = [{"review": f"film {i}", "stars": i % 3 + 9} for i in range(60)]
FIELDS = {"text": "review", "label": "stars"}


# classification


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_labels_found_in_the_rows_are_numbered_in_order(tmp_path, suffix):
    path = write(tmp_path / f"reviews.{suffix}", REVIEWS)
    task = get_task(f"classification:{path}", fields=FIELDS, holdout=0.3)
    assert task.labels == ("9", "10", "11")  # as numbers: not "10", "11", "9"
    assert (task.kind, task.num_labels, task.metric) == ("classification", 3, "accuracy")
    assert task.name == f"classification:reviews.{suffix}"
    train, report = task.train_examples(), task.report_examples()
    assert len(train) + len(report) == 60
    assert len(report) > 5
    assert not {e.key for e in train} & {e.key for e in report}
    for example in train + report:
        assert example.label == int(example.text.split()[1]) % 3
        assert example.text_pair is None


def test_all_formats_give_the_same_examples(tmp_path):
    found = [
        get_task(f"classification:{write(tmp_path / f'r.{suffix}', REVIEWS)}", fields=FIELDS)
        for suffix in SUFFIXES
    ]
    first = found[0].train_examples()
    assert len(first) > 30
    assert all(task.train_examples() == first for task in found)


@pytest.mark.parametrize(
    ("labels", "values", "expected"),
    [
        (["no", "yes"], ["yes", "no", 1, 0, "1", 1.0], [1, 0, 1, 0, 1, 1]),
        ({"n": "no", "y": "yes", "maybe": "no"}, ["y", "maybe", "n"], [1, 0, 0]),
        ({0: "no", 1: "yes"}, [1, "0", True], None),
        (["3", "4"], [4, "3"], [1, 0]),
        (["4", "0"], [0, 4], [1, 0]),  # a name, not the number of a class
        (None, [True, False, True], [1, 0, 1]),
        (None, ["b", "a", " b"], [1, 0, 1]),
    ],
)
def test_labels_may_be_names_or_numbers(tmp_path, labels, values, expected):
    rows = [{"text": f"t{i}", "label": value} for i, value in enumerate(values)]
    path = write(tmp_path / "own.jsonl", rows)
    task = get_task(f"classification:{path}", labels=labels, report=str(path))
    if expected is None:
        with pytest.raises(BadData, match="line 3: label 'true' is not known; labels known: '0'"):
            task.train_examples()
    else:
        assert [e.label for e in task.train_examples()] == expected
        assert task.num_labels == 2


def test_pairs_are_read_where_the_rows_have_them(tmp_path):
    rows = [{"a": "x", "b": "y", "label": i} for i in range(2)]
    path = write(tmp_path / "pairs.csv", rows)
    fields = {"text": "a", "text_pair": "b"}
    task = get_task(f"classification:{path}", fields=fields, report=str(path))
    assert [(e.text, e.text_pair) for e in task.report_examples()] == [("x", "y")] * 2
    fields["text_pair"] = "c"
    with pytest.raises(BadData, match="has no field 'c'"):
        get_task(f"classification:{path}", fields=fields, report=str(path)).train_examples()


def test_metrics_are_chosen_among_those_of_the_kind(tmp_path):
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(30)]
    name = f"classification:{write(tmp_path / 'own.jsonl', rows)}"
    task = get_task(name, metrics=["matthews", "accuracy"])
    assert [m.name for m in task.metrics] == ["matthews", "accuracy"]
    assert [m.name for m in get_task(name, metrics="f1").metrics] == ["f1"]
    with pytest.raises(BadRecipe, match=r"'mathews' \(did you mean 'matthews'\?\); allowed: acc"):
        get_task(name, metrics=["mathews"])
    with pytest.raises(BadRecipe, match="'pearson'; allowed"):
        get_task(name, metrics="pearson")
    with pytest.raises(BadRecipe, match="metrics is empty"):
        get_task(f"regression:{tmp_path / 'own.jsonl'}", metrics=[])
    with pytest.raises(BadRecipe, match=r"f1 is for two classes; .* has 3: a, b, c"):
        get_task(name, metrics="f1", labels=["a", "b", "c"])
    three = write(tmp_path / "three.jsonl", [{"text": "t", "label": i} for i in range(3)])
    with pytest.raises(BadRecipe, match="matthews is for two classes"):
        get_task(f"classification:{three}", metrics="matthews").train_examples()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": 1}] * 3, "has the label 1 alone"),
        ([{"text": "a", "label": i / 7} for i in range(1, 80)], "79 different labels in 79 rows"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": None}], "line 2: field 'label' is No"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": ""}], "it must be a label"),
        ([{"text": "a", "label": [1]}], "it must be a label"),
        ([{"text": "a", "lable": 1}], "did you mean 'lable'"),
        ([{"text": 3.5, "label": "a"}, {"text": None, "label": "b"}], "line 2: field 'text' is No"),
    ],
)
def test_rows_that_cannot_be_classes_are_explained(tmp_path, rows, message):
    path = write(tmp_path / "own.jsonl", rows)
    with pytest.raises(BadData, match=message):
        get_task(f"classification:{path}").train_examples()


def test_report_file_with_a_new_label_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "t", "label": x} for x in "ab"])
    other = write(tmp_path / "b.jsonl", [{"text": "t", "label": x} for x in "abc"])
    task = get_task(f"classification:{path}", report=str(other))
    with pytest.raises(BadData, match=r"b\.jsonl line 3: label 'c' is not known"):
        task.report_examples()


# regression


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_regression_reads_numbers(tmp_path, suffix):
    rows = [{"text": f"t{i}", "label": i / 4} for i in range(8)]
    path = write(tmp_path / f"own.{suffix}", rows)
    task = get_task(f"regression:{path}", report=str(path))
    assert [e.label for e in task.train_examples()] == [i / 4 for i in range(8)]
    assert (task.kind, task.num_labels, task.metric) == ("regression", 1, "pearson")


@pytest.mark.parametrize("label", ["high", None, "inf", "nan", True])
def test_regression_refuses_what_is_no_number(tmp_path, label):
    path = write(tmp_path / "own.jsonl", [{"text": "t", "label": label}])
    with pytest.raises(BadData, match=r"line 1: field 'label' is .* must be a number"):
        get_task(f"regression:{path}").train_examples()


# multiple choice


QUIZ = {"prompt": "What melts?", "choices": ["sand", "ice", "clay"]}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("gold", [1, "1", "B", "ice"])
def test_gold_may_be_number_letter_or_text(tmp_path, suffix, gold):
    path = write(tmp_path / f"quiz.{suffix}", [QUIZ | {"gold": gold}])
    task = get_task(f"multiple_choice:{path}", report=str(path))
    (example,) = task.report_examples()
    assert example.gold == 1
    assert example.prompt == "What melts?"
    assert example.choices == (" sand", " ice", " clay")
    assert example.completion == " ice"
    assert example.key == "What melts?\nsand\nice\nclay"
    assert (task.kind, task.head) == ("multiple-choice", "causal-lm")
    assert [m.name for m in task.metrics] == ["accuracy", "accuracy_norm"]


def test_labelled_choices_are_chosen_by_their_label(tmp_path):
    choices = {"text": ["sand", "ice"], "label": ["1", "2"]}
    path = write(tmp_path / "quiz.jsonl", [QUIZ | {"choices": choices, "gold": "2"}])
    (example,) = get_task(f"multiple_choice:{path}", report=str(path)).report_examples()
    assert example.gold == 1


def test_templates_word_the_question(tmp_path):
    path = write(tmp_path / "quiz.jsonl", [QUIZ | {"gold": 0}])
    (qa,) = get_task(f"multiple_choice:{path}", template="qa", report=str(path)).train_examples()
    assert (qa.prompt, qa.choices[0]) == ("Question: What melts?\nAnswer:", " sand")
    name = f"multiple_choice:{path}"
    (alpaca,) = get_task(name, template="alpaca", report=str(path)).train_examples()
    assert alpaca.prompt.endswith("### Response:\n")
    assert alpaca.choices[0] == "sand"  # the prompt ends its line


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gold": 3}, "line 1: field 'gold' is 3; it fits 0 of the 3 choices"),
        ({"gold": "D"}, "it fits 0 of the 3"),
        ({"gold": None}, "it fits 0 of the 3"),
        ({"gold": -1}, "it fits 0 of the 3"),
        ({"gold": "1", "choices": ["1", "2"]}, "it fits 2 of the 2"),
        ({"gold": "A", "choices": ["B", "A"]}, "it fits 2 of the 2"),
        ({"gold": 0, "choices": ["sand"]}, "must be a list of two texts or more"),
        ({"gold": 0, "choices": "sand, ice"}, "must be a list of two texts or more"),
        ({"gold": 0, "choices": ["", "ice"]}, "must be a list of two texts or more"),
    ],
)
def test_choices_that_leave_a_doubt_are_refused(tmp_path, fields, message):
    path = write(tmp_path / "quiz.jsonl", [QUIZ | fields])
    with pytest.raises(BadData, match=message):
        get_task(f"multiple_choice:{path}").train_examples()


def test_number_is_an_index_where_choices_are_numbers(tmp_path):
    path = write(tmp_path / "quiz.jsonl", [{"prompt": "1 + 1", "choices": [1, 2], "gold": 1}])
    assert get_task(f"multiple_choice:{path}", holdout=0.0).train_examples()[0].gold == 1


# extractive question answering


SPAN = {"question": "Where?", "context": "They came to Rome."}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "answers", ["Rome", ["Rome"], {"text": ["Rome"], "answer_start": [13]}, [{"text": "Rome"}]]
)
def test_answers_may_be_spelled_in_any_usual_way(tmp_path, suffix, answers):
    path = write(tmp_path / f"own.{suffix}", [SPAN | {"answers": answers}])
    task = get_task(f"extractive_qa:{path}", report=str(path), max_length=128, stride=32)
    (example,) = task.report_examples()
    assert (example.answers, example.answer_start) == (("Rome",), (13,))
    assert example.id.startswith(str(path))  # rows without an id are called by their place
    assert (task.kind, task.metric, task.max_length) == ("question-answering", "token_f1", 128)


def test_answer_in_brackets_is_text(tmp_path):
    row = {"question": "Which?", "context": "see [12] and {x}", "answers": "[12]"}
    path = write(tmp_path / "own.csv", [row, row | {"answers": "{x}"}])
    task = get_task(f"extractive_qa:{path}", report=str(path))
    assert [e.answers for e in task.train_examples()] == [("[12]",), ("{x}",)]


def test_fields_and_questions_without_answer(tmp_path):
    row = {"q": "Where?", "passage": "Nowhere.", "a": [], "nr": 7}
    path = write(tmp_path / "own.jsonl", [row])
    fields = {"question": "q", "context": "passage", "answers": "a", "id": "nr"}
    name = f"extractive_qa:{path}"
    with pytest.raises(BadData, match=r"line 1: field 'a' holds no answer[\s\S]*unanswerable"):
        get_task(name, fields=fields).train_examples()
    task = get_task(name, fields=fields, unanswerable=True, report=str(path), metrics="exact_match")
    (example,) = task.report_examples()
    assert (example.id, example.answers) == ("7", ())
    assert task.has_unanswerable
    assert [m.name for m in task.metrics] == ["exact_match"]


# sources


ALL = ("classification", "regression", "multiple_choice", "extractive_qa", "custom")


@pytest.mark.parametrize("name", ALL)
def test_source_and_its_options_are_the_same_for_every_kind(tmp_path, name):
    with pytest.raises(BadRecipe, match=f"task '{name}' needs a path or hub id"):
        get_task(name)
    with pytest.raises(BadRecipe, match="fields names 'tezt'"):
        get_task(f"{name}:a.jsonl", fields={"tezt": "a"})
    with pytest.raises(BadRecipe, match="holdout is 1"):
        get_task(f"{name}:a.jsonl", holdout=1.0)
    with pytest.raises(BadData, match="there is no file"):
        get_task(f"{name}:{tmp_path / 'a.csv'}").train_examples()


def test_hub_rows_are_split_as_asked(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(repo, subset, split):
        asked.append((repo, subset, split))
        return [{"text": f"t{i}", "label": i % 2} for i in range(4)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    options = {"split": "train[:4]", "report": "test", "subset": "en"}
    task = get_task("classification:hub:me/mine", **options)
    assert task.name == "classification:hub:me/mine"
    assert task.num_labels == 2
    task.train_examples()
    task.report_examples()
    assert asked == [("me/mine", "en", "train[:4]"), ("me/mine", "en", "test")]


def test_path_is_looked_for_in_the_data_folder_too(tmp_path):
    write(tmp_path / "own.csv", REVIEWS)
    task = get_task("classification:own.csv", data_dir=tmp_path, fields=FIELDS)
    assert task.num_labels == 3


def test_table_without_a_task_asks_what_it_is_for():
    with pytest.raises(BadRecipe, match=r"classification:rows\.csv or regression:rows\.csv"):
        get_task("rows.csv")
    with pytest.raises(BadRecipe, match=r"rows\.parquet"):
        get_task("rows.parquet")


def test_tables_serve_generation_too(tmp_path):
    path = write(tmp_path / "own.csv", [{"prompt": "2 + 2", "completion": "4"}])
    (example,) = get_task(f"custom:{path}", report=str(path)).report_examples()
    assert (example.key, example.answer) == ("2 + 2", "4")
