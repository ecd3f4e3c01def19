"""Finding the answer in generated text: tables of ordinary and tricky cases."""

from __future__ import annotations

import pytest

from elastune.tasks.answers import CHOICE, NUMBER, same_number, to_number

NUMBERS = [
    ("The answer is 72.", "72"),
    ("THE ANSWER IS 72", "72"),
    ("the answer is: $1,234.50.", "1234.50"),
    ("The answer is -3.", "-3"),
    ("The answer is −3.", "-3"),  # noqa: RUF001
    ("The answer is -$3.", "-3"),
    ("The answer is $-3.", "-3"),
    ("The answer is 1/2 of it.", "1/2"),
    ("The answer is 3 1/2 cups", "3 1/2"),
    (r"The answer is $\frac{1}{2}$.", "1/2"),
    (r"The answer is \boxed{72}.", "72"),
    ("The answer is 3 %.", "3"),
    ("The answer is **72**.", "72"),
    ("The answer is .5", ".5"),
    ("The answer is 5 + 3 = 8.", "8"),
    ("The answer is 15 gallons * 8 pints / gallon = 120 pints", "120"),
    ("The answer is 6, since 2 * 9 / 3 = 6 and 3 + 1 = 4.", "6"),
    ("The answer is x = 5.", "5"),
    ("The answer is 72. 3 * 4 = 12 is something else.", "72"),
    ("The answer is 72\n### Response: The answer is 5", "72"),
    ("The answer is simple.\nIt is 4.", "4"),
    ("The answer is what we want. The answer is 9.", "9"),
    ("He pays 3 for 2, so he has 10-3 = 7 left", "7"),
    ("10-3", "3"),
    ("(4)-3", "3"),
    ("It costs $18.", "18"),
    ("It costs 1,000,000 dollars", "1000000"),
    ("2 points/answer = 48 points\nThe answer is 66.", "66"),
    ("Answer: 12", "12"),
    ("It is 2e3 m", "2e3"),
    ("no number here", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "expected"), NUMBERS)
def test_number_is_extracted(text, expected):
    assert NUMBER.extract(text) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-3", -3),
        ("1,234.50", 1234.5),
        ("1/2", 0.5),
        ("-1/4", -0.25),
        ("3 1/2", 3.5),
        ("$18", 18),
        ("2e3", 2000),
        ("576.0", 576),
        (".5", 0.5),
        ("1/0", None),
        ("none", None),
    ],
)
def test_number_is_parsed(text, value):
    assert to_number(text) == value


def test_numbers_agree_within_a_thousandth():
    assert same_number("1.8333", "1.8333333333333335")
    assert same_number("72.0", "72")
    assert same_number("1/3", "0.3333")
    assert not same_number("1.83", "1.8333333333333335")
    assert not same_number("1201", "1200")
    assert not same_number(None, "3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is B.", "B"),
        ("the answer is (C) 62 m", "C"),
        ("The answer is (c).", "C"),
        ("ANSWER:B", "B"),
        ("The correct answer is option D", "D"),
        ("The answer is: **E**", "E"),
        ("The answer is A.\n### Instruction: B", "A"),
        ("the answer is a bit more than B", "B"),
        ("A train needs 4 hours, so C", "C"),
        ("Both (A) and (B) fail; D.", "D"),
        ("So it is B. A train is slow", "B"),
        ("CABLE", None),
        ("23.65", None),
    ],
)
def test_choice_is_extracted(text, expected):
    assert CHOICE.extract(text) == expected


@pytest.mark.parametrize("judge", [NUMBER, CHOICE], ids=["number", "choice"])
def test_nothing_written_after_a_final_answer_changes_it(judge):
    texts = [text for text, _ in NUMBERS] + ["The answer is B. So", "the answer is (C) 62"]
    tails = ["5", ".5", "/2", ",000", " The answer is 9.", "\nThe answer is E.", "Z", "e3 = 4"]
    checked = 0
    for text in texts:
        for end in range(len(text) + 1):
            if judge.is_final(text[:end]):
                for tail in tails:
                    checked += 1
                    assert judge.extract(text[:end] + tail) == judge.extract(text[:end]), text[:end]
    assert checked > 50


def test_incomplete_numbers_are_not_final():
    assert not NUMBER.is_final("The answer is 72")
    assert not NUMBER.is_final("The answer is 72.")
    assert NUMBER.is_final("The answer is 72. ")
    assert NUMBER.is_final("The answer is 72\n")
    assert not NUMBER.is_final("It is 72.\n")
    assert not CHOICE.is_final("The answer is A")
    assert CHOICE.is_final("The answer is A.")
