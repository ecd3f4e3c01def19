"""Leak checks: what they find, what they leave alone, and what they say."""

from __future__ import annotations

import gzip
import json
import random
import time
from pathlib import Path

import pytest

from elastune.errors import BadData, BadRecipe
from elastune.leaks import (
    SHARE,
    Leak,
    check_leaks,
    check_text_leaks,
    find_leaks,
    find_text_leaks,
    training_leaks,
)
from elastune.tasks.base import ClassificationExample, Example, MultipleChoiceExample, normalise

WORDS = [f"word{i}" for i in range(5000)]


def prose(n: int, seed: int) -> str:
    """Text of ``n`` words that occurs nowhere else."""
    return " ".join(random.Random(seed).choices(WORDS, k=n))


def piece(text: str) -> Example:
    """Running text, as a perplexity task gives it."""
    return Example(prompt="", completion=text, answer="", key=text)


def pair(first: str, second: str) -> ClassificationExample:
    return ClassificationExample(first, second, 1, f"{first}\n{second}")


# -- questions -----------------------------------------------------------------------------------


def test_a_question_is_found_whatever_its_case_punctuation_and_blanks() -> None:
    sides = {"train": ["How many?", "What is 2 + 2?", "Who?"], "validation": ["Where?"]}
    report = {"sums": ["what is  2+2", "What is 2 - 2?"], "other": ["WHERE"]}
    assert find_leaks(sides, report) == [
        Leak("train", "sums", 1, 0.5, "what is 2+2", (1,)),
        Leak("validation", "other", 1, 1.0, "WHERE", (0,)),
    ]


def test_repeats_within_a_side_and_among_report_sets_are_no_leak() -> None:
    assert find_leaks({"train": ["a b", "a b"]}, {"x": ["c"], "y": ["c", "c"]}) == []


def test_every_row_of_a_leaking_question_is_named() -> None:
    (leak,) = find_leaks({"train": ["same", "other", "Same!"]}, {"x": ["same", "same."]})
    assert leak.rows == (0, 2)
    assert leak.n == 2
    assert leak.share == 1


def test_keys_of_punctuation_alone_are_not_all_the_same() -> None:
    assert normalise("!") == normalise("?") == ""
    assert find_leaks({"train": ["!"]}, {"x": ["?"]}) == []
    assert find_leaks({"train": ["!"]}, {"x": [" !"]})[0].n == 1


@pytest.mark.parametrize(
    "example",
    [
        Example("Q: why?", " so", "so", "why?"),
        MultipleChoiceExample("Q: why?", (" a", " b"), 0, "why?"),
        ClassificationExample("why?", None, 1, "why?"),
    ],
)
def test_examples_of_every_kind_are_compared_by_their_key(example: Example) -> None:
    (leak,) = training_leaks({"train": [example]}, {"task": [pair("x", "y"), example]})
    assert (leak.report, leak.n, leak.share, leak.rows) == ("report:task", 1, 0.5, (0,))


def test_a_pair_leaks_only_as_a_whole() -> None:
    training = [pair("a man sleeps", "he snores"), pair("he snores", "a man sleeps")]
    report = {"mnli": [pair("a man sleeps", "he is awake"), pair("A man sleeps.", "He snores.")]}
    (leak,) = training_leaks({"train": training}, report)
    assert (leak.n, leak.rows) == (1, (0,))


# -- policies ------------------------------------------------------------------------------------

TRAINING = [pair(f"text {i}", "same") for i in range(20)]
REPORT = {"a": [pair("new", "same"), TRAINING[4]], "b": [TRAINING[4], TRAINING[9]]}


def test_refusing_names_every_pair_of_sets_and_a_sample() -> None:
    with pytest.raises(BadData) as caught:
        check_leaks(TRAINING, REPORT)
    message = str(caught.value)
    assert "1 question(s) of report:a (50.00%) occur in train" in message
    assert "2 question(s) of report:b (100.00%) occur in train" in message
    assert "'text 4 same'" in message
    assert "data.leaks=drop" in (caught.value.try_ or "")


def test_dropping_gives_the_rows_to_keep_and_a_line_for_every_set() -> None:
    kept, notes = check_leaks(TRAINING, REPORT, "drop")
    assert kept == [i for i in range(20) if i not in (4, 9)]
    assert len(notes) == 2
    assert notes[1].startswith("2 of 20 training rows dropped")
    assert "report:b" in notes[1]


def test_warning_keeps_all_rows() -> None:
    kept, notes = check_leaks(TRAINING, REPORT, "warn")
    assert kept == list(range(20))
    assert len(notes) == 2


def test_without_leaks_nothing_is_said() -> None:
    for policy in ("refuse", "drop", "warn"):
        assert check_leaks(TRAINING[:4], REPORT, policy) == ([0, 1, 2, 3], [])  # type: ignore[arg-type]


def test_a_misspelt_policy_is_refused() -> None:
    with pytest.raises(BadRecipe, match=r"leaks is 'warm' \(did you mean 'warn'\?\)"):
        check_leaks(TRAINING, REPORT, "warm")  # type: ignore[arg-type]
    with pytest.raises(BadRecipe, match="allowed: refuse, drop, warn"):
        check_text_leaks(["text"], REPORT, "")  # type: ignore[arg-type]


def test_a_long_sample_is_cut() -> None:
    long = pair("many words " * 40, "x")
    with pytest.raises(BadData) as caught:
        check_leaks([long], {"a": [long]})
    assert len(str(caught.value)) < 400


# -- running text --------------------------------------------------------------------------------


def naive_share(text: list[str], example: str) -> float:
    """Share of the 13-grams of an example in passages, by the definition."""
    words = normalise(example).split()
    held = {
        tuple(passage[i : i + 13])
        for passage in (normalise(p).split() for p in text)
        for i in range(len(passage) - 12)
    }
    grams = [tuple(words[i : i + 13]) for i in range(len(words) - 12)]
    return sum(gram in held for gram in grams) / len(grams)


def test_a_leak_is_what_the_definition_says() -> None:
    passages = [prose(300, seed) for seed in range(4)]
    words = passages[2].split()
    examples = [
        " ".join(words[40 : 40 + taken]) + " " + prose(60 - taken, 100 + taken)
        for taken in range(0, 61, 4)
    ]
    shares = [naive_share(passages, example) for example in examples]
    assert 0 < sum(share >= SHARE for share in shares) < len(shares)
    (leak,) = find_text_leaks({"c4": passages}, {"task": examples})
    assert leak.n == sum(share >= SHARE for share in shares)
    assert leak.rows == (2,)
    (strict,) = find_text_leaks({"c4": passages}, {"task": examples}, share=0.9)
    assert strict.n == sum(share >= 0.9 for share in shares)


@pytest.mark.parametrize(("n_words", "found"), [(7, False), (8, True), (12, True), (13, True)])
def test_a_short_text_counts_as_a_whole_and_a_very_short_one_not_at_all(
    n_words: int, found: bool
) -> None:
    passage = prose(200, 0)
    short = " ".join(passage.split()[50 : 50 + n_words])
    assert bool(find_text_leaks({"c4": [passage]}, {"task": [prose(9, 5), short]})) == found
    changed = short.rsplit(" ", 1)[0] + " otherwise"
    assert find_text_leaks({"c4": [passage]}, {"task": [changed]}) == []


def test_words_are_not_matched_across_the_ends_of_passages_or_examples() -> None:
    words = prose(40, 0).split()
    passages = [" ".join(words[:20]), " ".join(words[20:])]
    assert find_text_leaks({"c4": passages}, {"task": [" ".join(words[10:30])]}) == []
    assert find_text_leaks({"c4": [" ".join(words)]}, {"task": ["a b c", "d e"]}) == []


def test_text_is_compared_without_case_and_punctuation() -> None:
    example = prose(30, 0)
    passage = "Before that: " + example.upper().replace(" ", ", ", 5) + "!"
    assert find_text_leaks({"c4": [prose(20, 1), passage]}, {"task": [example]})[0].rows == (1,)


def test_the_leaking_examples_of_each_report_set_are_told_apart() -> None:
    sets = {name: [prose(40, 10 * place + i) for i in range(3)] for place, name in enumerate("abc")}
    passages = [prose(50, 99), f"x {sets['b'][2]} y", f"{sets['c'][0]} {sets['c'][1]}"]
    leaks = find_text_leaks({"c4": passages, "none": [prose(90, 77)]}, sets)
    assert [(leak.report, leak.n, leak.rows) for leak in leaks] == [("b", 1, (1,)), ("c", 2, (2,))]
    assert leaks[0].sample.startswith(sets["b"][2][:20])


def test_nothing_leaks_into_or_out_of_empty_sets() -> None:
    assert find_text_leaks({"c4": []}, {"task": [prose(40, 0)]}) == []
    assert find_text_leaks({"c4": [prose(40, 0)]}, {"task": []}) == []
    assert find_text_leaks({"c4": ["", "!"]}, {"task": ["", "?"]}) == []


def test_text_to_train_on_is_found_though_it_is_cut_elsewhere() -> None:
    text = prose(3000, 0).split()
    report = {"wiki": [piece(" ".join(text[i : i + 300])) for i in range(0, 3000, 300)]}
    shifted = [piece(" ".join(text[i : i + 300])) for i in range(150, 1500, 300)]
    (leak,) = training_leaks({"train": shifted}, report)
    # Of the first piece the text has less than half, of the next four both halves.
    assert (leak.report, leak.n) == ("report:wiki", 4)
    assert leak.rows == (0, 1, 2, 3, 4)
    kept, (note,) = check_leaks([piece(prose(300, 5)), *shifted], report, "drop")
    assert kept == [0]
    assert "5 of 6 training rows dropped" in note


def test_questions_with_common_wording_are_not_taken_for_running_text() -> None:
    form = "Please answer the following question with true or false and with nothing else at all: "
    training = [Example(f"{form}is {i}?", "", "", f"{form}is {i}?") for i in range(5)]
    report = {"boolq": [Example(f"{form}was {i}?", "", "", f"{form}was {i}?") for i in range(5)]}
    assert training_leaks({"train": training}, report) == []


def test_calibration_passages_that_hold_report_examples_go_by_the_policy() -> None:
    passages = [prose(100, seed) for seed in range(5)]
    held = piece(passages[3][100:500])
    report = {"wiki": [piece(prose(100, 50)), held]}
    with pytest.raises(BadData, match=r"1 question\(s\) of report:wiki .* in the calibration text"):
        check_text_leaks(passages, report)
    kept, (note,) = check_text_leaks(passages, report, "drop", name="c4")
    assert kept == passages[:3] + passages[4:]
    assert note.startswith("1 of 5 passages of c4 dropped")
    assert check_text_leaks(passages, report, "warn")[0] == passages
    assert check_text_leaks(passages[:3], report) == (passages[:3], [])


# -- size ----------------------------------------------------------------------------------------


def test_as_many_rows_as_sst2_has_are_checked_in_seconds() -> None:
    words = prose(9 * 67_800, 0).split()
    texts = [" ".join(words[i : i + 9]) for i in range(0, len(words), 9)]
    examples = [ClassificationExample(text, None, 0, text) for text in texts]
    training, report = examples[:67_000], {"sst2": examples[66_997:]}
    started = time.process_time()
    (leak,) = training_leaks({"train": training}, report)
    assert leak.n == 3
    assert time.process_time() - started < 5  # measured: 1 s


def rows_of(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_real_training_sets_leak_what_a_naive_count_says(data_dir: Path) -> None:
    def keys(folder: str, name: str, field: str) -> list[str]:
        return [row[field] for row in rows_of(data_dir / folder / f"{name}.jsonl.gz")]

    train, dev = (keys("glue/cola", name, "sentence") for name in ("train", "validation"))
    known = {normalise(text) for text in train}
    (leak,) = find_leaks({"train": train}, {"cola": dev})
    assert leak.n == sum(normalise(text) in known for text in dev) > 0
    sums = [keys("gsm8k", name, "question") for name in ("train", "test")]
    assert find_leaks({"train": sums[0]}, {"gsm8k": sums[1]}) == []


def test_wikitexts_own_test_text_is_found_and_its_training_text_is_clean(data_dir: Path) -> None:
    def lines(name: str) -> list[str]:
        with gzip.open(data_dir / "wikitext2" / f"{name}.txt.gz", "rt", encoding="utf-8") as file:
            return [line for line in file if len(line.split()) > 20][:400]

    test = lines("test")
    assert find_text_leaks({"train": lines("train_head")}, {"wikitext2": test}) == []
    (leak,) = find_text_leaks({"train": ["".join(test[50:90])]}, {"wikitext2": test})
    assert leak.n >= 40
