"""Judge an answer that is a piece of text: SQuAD's normalisation, exact match and F1.

Rajpurkar et al., 2016 (arXiv 1606.05250) and 2018 (arXiv 1806.03822); results equal those of the
official scripts of SQuAD 1.1 and 2.0 (see `token_f1` for the one place where these differ).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Return ``text`` in lower case without ASCII punctuation, articles and runs of blanks.

    Punctuation goes first: "the-end" is one word and keeps its "the".
    """
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """Return 1.0 when ``prediction`` equals one of the gold answers, both normalised.

    No gold answer means that the question has none: then ``""`` is right (SQuAD 2.0).
    """
    given = normalise_answer(prediction)
    return float(any(given == gold for gold in _normalised(golds)))


def token_f1(prediction: str, golds: Sequence[str]) -> float:
    """Return the best F1, in [0, 1], of the words of ``prediction`` against a gold answer's.

    Words count as often as they occur. Where one side has no words, F1 is 1.0 if the other has
    none either, else 0.0, and gold answers of articles and punctuation alone do not count beside
    others: rules of SQuAD 2.0 (1.1's script keeps such answers, and gives 0.0 for two empty ones).
    """
    given = normalise_answer(prediction).split()
    return max(_f1(given, gold.split()) for gold in _normalised(golds))


def _normalised(golds: Sequence[str]) -> list[str]:
    return [text for gold in golds if (text := normalise_answer(gold))] or [""]


def _f1(given: list[str], gold: list[str]) -> float:
    if not given or not gold:
        return float(given == gold)
    shared = (Counter(given) & Counter(gold)).total()
    return 2 * shared / (len(given) + len(gold))
