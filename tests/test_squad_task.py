"""SQuAD: answers are judged as the official scripts judge them, and point at their text."""

from __future__ import annotations

import json
import random

import pytest

from elastune.errors import BadData, BadRecipe
from elastune.tasks import get_task
from elastune.tasks.spans import exact_match, normalise_answer, token_f1

WORDS = ["The", "a", "an", "cat", "Cat,", "U.S.", "the-end", "2,000", "—", "é", "\u00a0", "of", "!"]


def phrase(rng):
    return " ".join(rng.choices(WORDS, k=rng.randrange(6)))


def test_normalisation_and_f1_equal_the_official_script_on_random_answers():
    # The harness carries SQuAD 1.1's official functions.
    official = pytest.importorskip("lm_eval.tasks.qasper.metrics")
    rng = random.Random(0)
    seen = set()
    for _ in range(4000):
        prediction, gold = phrase(rng), phrase(rng)
        given, right = normalise_answer(prediction), normalise_answer(gold)
        assert given == official.normalize_answer(prediction)
        assert exact_match(prediction, [gold]) == (given == right)
        if given and right:
            f1 = token_f1(prediction, [gold])
            assert f1 == pytest.approx(official.f1_abstractive([prediction], [gold]))
            seen.add(round(f1, 2))
    assert len(seen) > 10  # the phrases do overlap in many ways


def test_f1_is_that_of_words_paired_one_to_one():
    rng = random.Random(1)
    for _ in range(500):
        prediction, gold = (rng.choices("xyz", k=rng.randrange(1, 6)) for _ in range(2))
        left, hits = list(gold), 0
        for word in prediction:
            if word in left:
                left.remove(word)
                hits += 1
        precision, recall = hits / len(prediction), hits / len(gold)
        expected = 2 * precision * recall / (precision + recall) if hits else 0
        assert token_f1(" ".join(prediction), [" ".join(gold)]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "f1"),
    [
        ("The Cat!", ["cat"], 1, 1),  # case, article, punctuation
        ("theatre", ["atre"], 0, 0),  # an article inside a word is none
        ("the-end", ["the end"], 0, 0),  # punctuation goes before articles do
        ("the-end", ["theend"], 1, 1),
        ("New York City", ["New York", "York"], 0, 0.8),  # the best of the answers
        ("to be or to be", ["to be"], 0, 4 / 7),  # a word counts as often as it occurs
        ("", [], 1, 1),  # rightly no answer
        ("a guess", [], 0, 0),
        ("", ["Paris"], 0, 0),
        ("the", [], 1, 1),  # normalises to nothing
        ("Paris", ["the", "Paris"], 1, 1),
        ("", ["the", "Paris"], 0, 0),  # an answer of an article alone does not count
    ],
)
def test_known_cases_score_as_in_the_official_scripts(prediction, golds, exact, f1):
    assert exact_match(prediction, golds) == exact
    assert token_f1(prediction, golds) == pytest.approx(f1)


def row(**fields):
    answers = {"text": ["Rome"], "answer_start": [10]}
    usual = {"id": "1", "question": "Where?", "context": "They came Rome.", "answers": answers}
    return usual | fields


def squad(folder, rows, name="squad", **options):
    (folder / name).mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name / "train.jsonl").write_text(text, encoding="utf-8")
    return get_task(name, data_dir=folder, **options)


def test_every_start_points_at_its_answer(data_dir):
    task = get_task("squad", data_dir=data_dir)
    train, report = task.train_examples(), task.report_examples()
    assert (len(train), len(report)) == (8149, 10570)
    assert len({e.id for e in report}) == 10570
    assert sum(len(e.answers) for e in report) == 34726
    for example in [*train, *report]:
        assert len(example.answers) == len(example.answer_start) > 0
        for text, start in zip(example.answers, example.answer_start, strict=True):
            assert example.context[start : start + len(text)] == text
            # Three answers of the development split are "the" or a full stop alone.
            assert exact_match(text, example.answers) == bool(normalise_answer(text))


@pytest.mark.parametrize("start", [10, 3, -4, 99, None])
def test_wrong_starts_are_put_right(tmp_path, start):
    answers = {"text": ["Rome"], "answer_start": [start]}
    (example,) = squad(tmp_path, [row(answers=answers)]).train_examples()
    assert example.answer_start == (10,)


def test_right_start_of_a_repeated_answer_is_kept(tmp_path):
    answers = {"text": ["Rome"], "answer_start": [8]}
    rows = [row(context="Rome or Rome", answers=answers)]
    assert squad(tmp_path, rows).train_examples()[0].answer_start == (8,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answers": {"text": ["Paris"], "answer_start": [0]}}, "line 1: the answer 'Paris' does"),
        ({"answers": {"text": [], "answer_start": []}}, "line 1: field 'answers' holds no answer"),
        ({"answers": {"text": ["Rome"], "answer_start": []}}, "allowed: {text:"),
        ({"answers": {"text": "Rome", "answer_start": [10]}}, "allowed: {text:"),
        ({"answers": 3}, "allowed: {text:"),
        ({"answers": [3]}, "allowed: {text:"),
        ({"answers": {"text": [""], "answer_start": [0]}}, "is empty"),
        ({"question": None}, "field 'question' is None"),
    ],
)
def test_rows_that_teach_nothing_are_refused_with_their_place(tmp_path, fields, message):
    with pytest.raises(BadData, match=message):
        squad(tmp_path, [row(**fields)]).train_examples()


def test_version_2_takes_questions_without_answers(tmp_path):
    rows = [row(answers={"text": [], "answer_start": []}), row()]
    task = squad(tmp_path, rows, name="squad_v2")
    assert task.has_unanswerable
    assert [e.answers for e in task.train_examples()] == [(), ("Rome",)]
    assert not get_task("squad").has_unanswerable


def test_same_question_of_another_paragraph_is_another_example(tmp_path):
    first, second = squad(tmp_path, [row(), row(context="Then Rome.")]).train_examples()
    assert first.key != second.key


def test_f1_goes_first_and_options_reach_the_task():
    task = get_task("squad_v2", max_length=256, stride=64, no_answer_threshold=-1.5)
    assert [metric.name for metric in task.metrics] == ["token_f1", "exact_match"]
    assert (task.kind, task.head) == ("question-answering", "question-answering")
    assert (task.max_length, task.stride, task.no_answer_threshold) == (256, 64, -1.5)
    assert (task.n_best, task.max_answer_length) == (20, 30)


@pytest.mark.parametrize(
    "options", [{"stride": 384}, {"stride": -1}, {"max_length": 4}, {"n_best": 0}]
)
def test_impossible_windows_are_refused(options):
    with pytest.raises(BadRecipe, match="must be at least"):
        get_task("squad", **options)


def test_missing_splits_and_hub_names(tmp_path, monkeypatch):
    with pytest.raises(BadData, match="finds no validation split"):
        squad(tmp_path, [row()]).report_examples()
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(repo, subset, split):
        asked.append((repo, split))
        return [row()]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("squad", "squad_v2"):
        get_task(name).report_examples()
    assert asked == [("rajpurkar/squad", "validation"), ("rajpurkar/squad_v2", "validation")]
