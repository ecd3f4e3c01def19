"""Find the answer in generated text: a number or the letter of a choice.

Rules follow the evaluators of LLM-Adapters (last number of the text, tolerance 1e-3, letter of
the choice), but an explicit "the answer is ..." goes first. Every ``*_is_final`` keeps one law:
once it holds, no further text changes what is extracted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

TOLERANCE = 1e-3

_PHRASE = re.compile(r"\banswer\s*(?:is\b|:)", re.IGNORECASE)
_CLAUSE_END = re.compile(r"\n|[.!?](?=\s)")
# "15 gallons * 8 = 120" states 120; "6, since 2 * 3 = 6" has stated it before.
_EXPRESSION = re.compile(r"(?!.*\b(?:since|because|as|so)\b)[^=]*[-+*/×÷][^=]*=", re.IGNORECASE)  # noqa: RUF001
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
# A minus is a sign unless it follows a number, a name or a bracket: "10-3" holds 10 and 3.
_SIGN = r"(?:(?<![\w)\]])-)?"
_NUMBER = re.compile(
    rf"({_SIGN})\$?({_SIGN})((?:{_INTEGER}\s+\d+/\d+(?![\d.]))|(?:{_DECIMAL}(?:/{_DECIMAL})?))"
)


def extract_number(text: str) -> str | None:
    """Return the number ``text`` answers with, without currency signs and thousands commas.

    The number after the first "the answer is" that has one in its sentence ("5 + 3 = 8" gives
    8); without such a phrase the last number of the text; None without any number.
    """
    text = _plain(text)
    for clause, _ in _answer_clauses(text):
        expression = _EXPRESSION.match(clause)
        if expression:
            match = _NUMBER.search(clause, expression.end())
            if match:
                return _clean(match)
        match = _NUMBER.search(clause)
        if match:
            return _clean(match)
    matches = list(_NUMBER.finditer(text))
    return _clean(matches[-1]) if matches else None


def number_is_final(text: str) -> bool:
    """Tell whether a sentence "the answer is <number>" is complete in ``text``."""
    return any(
        ended and _NUMBER.search(clause) is not None
        for clause, ended in _answer_clauses(_plain(text))
    )


def to_number(text: str) -> float | None:
    """Return an extracted or gold number (``-3``, ``1,234.50``, ``1/2``, ``3 1/2``) as float."""
    match = _NUMBER.search(_plain(text))
    if match is None:
        return None
    sign = -1.0 if "-" in match[1] + match[2] else 1.0
    whole, _, rest = match[3].replace(",", "").rpartition(" ")
    numerator, _, denominator = rest.partition("/")
    below = float(denominator) if denominator else 1.0
    if below == 0:
        return None
    return sign * ((float(whole) if whole.strip() else 0.0) + float(numerator) / below)


def same_number(given: str | None, gold: str) -> bool:
    """Tell whether two numbers differ by at most 1e-3 (absolute, as in LLM-Adapters)."""
    if given is None:
        return False
    left, right = to_number(given), to_number(gold)
    return left is not None and right is not None and abs(left - right) <= TOLERANCE


def extract_choice(text: str, letters: str = "ABCDE") -> str | None:
    """Return the letter chosen in ``text``: after "answer is", else the last standing alone.

    An "A" before a small letter is the article unless it follows "answer is".
    """
    match = _choice_phrase(letters).search(text)
    if match:
        return (match[1] or match[2]).upper()
    alone = re.findall(rf"(?<![A-Za-z'\u2019])(?!A [a-z])([{letters}])(?![A-Za-z'\u2019])", text)
    return alone[-1] if alone else None


def choice_is_final(text: str, letters: str = "ABCDE") -> bool:
    """Tell whether "answer is <letter>" stands in ``text`` with something after the letter."""
    match = _choice_phrase(letters).search(text)
    return match is not None and match.end() < len(text)


@dataclass(frozen=True)
class Judge:
    """How free text is judged: find the answer, know when it is final, compare it with gold."""

    extract: Callable[[str], str | None]
    is_final: Callable[[str], bool]
    is_same: Callable[[str | None, str], bool]


NUMBER = Judge(extract_number, number_is_final, same_number)
CHOICE = Judge(extract_choice, choice_is_final, lambda given, gold: given == gold)


def _choice_phrase(letters: str) -> re.Pattern[str]:
    # Only the words ignore case: a bare small letter ("the answer is a bit more") is no choice.
    return re.compile(
        r"\b(?i:answer\s*(?:is\b|:))[^A-Za-z0-9]{0,6}(?:(?i:option|choice)\b[^A-Za-z0-9]{0,4})?"
        rf"(?:([{letters}])(?![A-Za-z'\u2019])|(?<=\()([{letters.lower()}])(?=\)))"
    )


def _answer_clauses(text: str) -> list[tuple[str, bool]]:
    """Return what follows each "answer is" up to the sentence's end, and whether it ended."""
    clauses = []
    for phrase in _PHRASE.finditer(text):
        end = _CLAUSE_END.search(text, phrase.end())
        clauses.append((text[phrase.end() : end.start() if end else None], end is not None))
    return clauses


def _plain(text: str) -> str:
    return _LATEX_FRACTION.sub(r"\1/\2", text.replace("−", "-").replace("–", "-"))  # noqa: RUF001


def _clean(match: re.Match[str]) -> str:
    sign = "-" if "-" in match[1] + match[2] else ""
    return sign + " ".join(match[3].replace(",", "").split())
