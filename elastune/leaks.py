"""Whether report examples were seen before: in training, validation or calibration text.

Two checks, both on normalised text. Questions are compared whole: training and report must not
ask the same. Running text (calibration passages, language-model training) has no questions:
there the share of a report example's 13-grams that occur in the text counts, after Brown et al.,
Language Models are Few-Shot Learners, 2020, appendix C.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import numpy as np

from elastune.errors import BadData, BadRecipe, nearest
from elastune.tasks.base import normalise

Policy = Literal["refuse", "drop", "warn"]
"""What becomes of a leak: an error, training without the leaking rows, or a note."""

NGRAM = 13
SHORTEST = 8
"""Words below which a text occurs elsewhere by chance; up to NGRAM it counts as a whole."""
SHARE = 0.5
"""An example leaks when at least this share of its n-grams occur in the text."""
_SAMPLE_CHARS = 120


class HasKey(Protocol):
    """Any example: its ``key`` is the question, or the text, that must not be seen before."""

    @property
    def key(self) -> str: ...


@dataclass(frozen=True)
class Leak:
    """Report examples that occur on another side.

    Attributes:
        side: where they occur: ``train``, ``validation``, a text's name.
        report: the report set.
        n: how many examples of it leak, and ``share`` of the set that is.
        sample: one of them, at most 120 characters.
        rows: rows of the side that hold them.
    """

    side: str
    report: str
    n: int
    share: float
    sample: str
    rows: tuple[int, ...]


def find_leaks(
    sides: Mapping[str, Sequence[str]], report: Mapping[str, Sequence[str]]
) -> list[Leak]:
    """Find questions of the report sets that are asked in ``sides``, too.

    Both map a name to questions; they are compared as `tasks.base.normalise` leaves them, with
    equal case, punctuation and blanks. Repeats within a side or among report sets are no leak.
    """
    places = {name: _places(keys) for name, keys in sides.items()}
    found = []
    for report_name, questions in report.items():
        asked = _places(questions)
        for side, known in places.items():
            shared = asked.keys() & known.keys()
            if shared:
                hit = sorted(row for key in shared for row in asked[key])
                rows = sorted(row for key in shared for row in known[key])
                found.append(_leak(side, report_name, questions, hit, rows))
    return found


def find_text_leaks(
    texts: Mapping[str, Sequence[str]],
    report: Mapping[str, Sequence[str]],
    *,
    share: float = SHARE,
) -> list[Leak]:
    """Find report examples that running text holds.

    An example leaks when at least ``share`` of its 13-word sequences occur within passages of a
    text; one of 8 to 12 words when it occurs as a whole. Shorter ones are not looked for. ``rows``
    are the passages that hold a sequence of a leaking example.
    """
    codes: dict[str, int] = {}
    asked = _Words.of([key for keys in report.values() for key in keys], codes)
    ends = np.cumsum([len(keys) for keys in report.values()])
    found = []
    for side, passages in texts.items():
        hits = _overlap(_Words.of(passages, codes), asked, share)
        for (name, keys), end in zip(report.items(), ends, strict=True):
            first = int(end) - len(keys)
            hit = {row - first: rows for row, rows in hits.items() if first <= row < end}
            if hit:
                rows = sorted(set().union(*hit.values()))
                found.append(_leak(side, name, keys, sorted(hit), rows))
    return found


def check_leaks(
    training: Sequence[HasKey], report: Mapping[str, Sequence[HasKey]], policy: Policy = "refuse"
) -> tuple[list[int], list[str]]:
    """Apply a policy to training examples that ask what a report set asks.

    Examples without a prompt are running text (perplexity): they are searched by n-grams.

    Returns:
        The rows of ``training`` to keep, in order, and a line for the user for every leak.

    Raises:
        BadData: there are leaks and the policy is ``refuse``; it names sets, counts and a sample.
    """
    check_policy(policy)
    leaks = training_leaks({"train": training}, report)
    if policy == "refuse":
        refuse(leaks)
    if policy == "warn":
        return list(range(len(training))), [warning(leak) for leak in leaks]
    dropped = {row for leak in leaks for row in leak.rows}
    kept = [row for row in range(len(training)) if row not in dropped]
    return kept, [_dropped(leak, len(training), "training rows") for leak in leaks]


def check_text_leaks(
    texts: Sequence[str],
    report: Mapping[str, Sequence[HasKey]],
    policy: Policy = "refuse",
    *,
    name: str = "the calibration text",
) -> tuple[list[str], list[str]]:
    """Apply a policy to passages of running text that hold report examples (`find_text_leaks`).

    Returns:
        The passages to keep, and a line for the user for every leak.

    Raises:
        BadData: there are leaks and the policy is ``refuse``; it names text, set, counts, a sample.
    """
    check_policy(policy)
    leaks = find_text_leaks({name: texts}, _keys(prefixed(report)))
    if policy == "refuse":
        refuse(leaks)
    if policy == "warn":
        return list(texts), [warning(leak) for leak in leaks]
    dropped = {row for leak in leaks for row in leak.rows}
    kept = [text for row, text in enumerate(texts) if row not in dropped]
    return kept, [_dropped(leak, len(texts), f"passages of {name}") for leak in leaks]


def training_leaks(
    sides: Mapping[str, Sequence[HasKey]], report: Mapping[str, Sequence[HasKey]]
) -> list[Leak]:
    """Find leaks of the report sets in sides of examples, by question and in running text.

    Report sets are named ``report:<task>``, so that they cannot be taken for the other side.
    """
    keys, asked = _keys(sides), _keys(prefixed(report))
    found = find_leaks(keys, asked)
    for side, examples in sides.items():
        # Running text on either side: pieces cut at other places are not equal as a whole.
        wanted = {
            name: asked[f"report:{name}"]
            for name, others in report.items()
            if _is_running_text(examples) or _is_running_text(others)
        }
        for leak in find_text_leaks({side: keys[side]}, wanted):
            found = _merged(found, replace(leak, report=f"report:{leak.report}"))
    return found


def refuse(leaks: Sequence[Leak]) -> None:
    """Refuse leaks, if there are any.

    Raises:
        BadData: names every pair of sets, how many examples they share, and one of those.
    """
    if not leaks:
        return
    told = "; ".join(
        f"{leak.n} question(s) of {leak.report} ({leak.share:.2%}) occur in {leak.side}, "
        f"for example {leak.sample!r}"
        for leak in leaks
    )
    raise BadData(
        told,
        try_="data.leaks=drop leaves them out of the training side (or warn keeps them); "
        "scores on seen questions mean nothing",
    )


def check_policy(policy: str) -> None:
    """Refuse a policy that does not exist.

    Raises:
        BadRecipe: names the policies that do.
    """
    known = get_args(Policy)
    if policy not in known:
        raise BadRecipe(
            f"leaks is {policy!r}{nearest(policy, known)}; allowed: {', '.join(known)}."
        )


def prefixed(report: Mapping[str, Sequence[HasKey]]) -> dict[str, Sequence[HasKey]]:
    """Name report sets ``report:<task>``."""
    return {f"report:{name}": examples for name, examples in report.items()}


def normal_keys(examples: Iterable[HasKey]) -> list[str]:
    """Return the normalised questions of examples."""
    return [_normal(example.key) for example in examples]


def _normal(key: str) -> str:
    # Of a key that is punctuation alone nothing would be left: such keys are not all the same.
    return normalise(key) or key.strip()


def _keys(sets: Mapping[str, Sequence[HasKey]]) -> dict[str, list[str]]:
    return {name: [example.key for example in examples] for name, examples in sets.items()}


def _places(keys: Iterable[str]) -> dict[str, list[int]]:
    """Map each normalised key to the rows that have it."""
    found: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        found.setdefault(_normal(key), []).append(row)
    return found


def _is_running_text(examples: Sequence[HasKey]) -> bool:
    """Tell whether examples are text without questions; sets are of one kind."""
    return bool(examples) and getattr(examples[0], "prompt", None) == ""


def _leak(
    side: str, report: str, questions: Sequence[str], hit: Sequence[int], rows: Sequence[int]
) -> Leak:
    sample = " ".join(questions[hit[0]].split())[:_SAMPLE_CHARS]
    return Leak(side, report, len(hit), len(hit) / len(questions), sample, tuple(rows))


def _merged(leaks: list[Leak], other: Leak) -> list[Leak]:
    """Add a leak found by n-grams to those found by whole questions."""
    for place, leak in enumerate(leaks):
        if (leak.side, leak.report) == (other.side, other.report):
            larger = leak if leak.n >= other.n else other
            rows = tuple(sorted({*leak.rows, *other.rows}))
            return [*leaks[:place], replace(larger, rows=rows), *leaks[place + 1 :]]
    return [*leaks, other]


def _dropped(leak: Leak, of: int, what: str) -> str:
    return (
        f"{len(leak.rows):,} of {of:,} {what} dropped: they hold {leak.n:,} question(s) of "
        f"{leak.report}, for example {leak.sample!r}"
    )


def warning(leak: Leak) -> str:
    """Return the line for the user of a leak that is kept."""
    return (
        f"{leak.n:,} question(s) of {leak.report} ({leak.share:.2%}) occur in {leak.side}, for "
        f"example {leak.sample!r}: the score on them means nothing"
    )


@dataclass(frozen=True)
class _Words:
    """Texts end to end as word codes.

    ``codes`` are (W,) uint64; ``starts`` the texts' W offsets, one more than there are texts.
    """

    codes: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[str], known: dict[str, int]) -> _Words:
        numbers: list[int] = []
        starts = [0]
        for text in texts:
            numbers += [known.setdefault(word, len(known)) for word in normalise(text).split()]
            starts.append(len(numbers))
        return cls(_mixed(np.array(numbers, dtype=np.uint64)), np.array(starts))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def subset(self, wanted: np.ndarray) -> _Words:
        """Return the texts that a boolean mask marks."""
        starts = np.concatenate([[0], np.cumsum(self.lengths[wanted])])
        return _Words(self.codes[np.repeat(wanted, self.lengths)], starts)

    def ngrams(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the hashes of all ``size``-grams within a text, and each one's text."""
        count = len(self.codes) - size + 1
        if count <= 0:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        # Arithmetic modulo 2^64; the multiplier is odd, so that no bit is lost.
        hashes = np.zeros(count, np.uint64)
        for k in range(size):
            hashes = hashes * np.uint64(6364136223846793005) + self.codes[k : k + count]
        owner = np.repeat(np.arange(len(self.starts) - 1), self.lengths)
        inside = owner[:count] == owner[size - 1 :]
        return hashes[inside], owner[:count][inside]


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Spread small numbers over 64 bits (Steele et al., 2014: SplitMix64)."""
    x = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _overlap(text: _Words, examples: _Words, share: float) -> dict[int, set[int]]:
    """Map each leaking example to the passages of ``text`` that hold some of its n-grams."""
    found: dict[int, set[int]] = {}
    for size in range(SHORTEST, NGRAM + 1):
        wanted = examples.lengths >= size if size == NGRAM else examples.lengths == size
        places = np.flatnonzero(wanted)
        theirs, owner = examples.subset(wanted).ngrams(size)
        ours, passage = text.ngrams(size)
        if not len(theirs) or not len(ours):
            continue
        order = np.argsort(ours)
        ours, passage = ours[order], passage[order]
        first = np.searchsorted(ours, theirs)
        seen = ours[np.minimum(first, len(ours) - 1)] == theirs
        held = np.bincount(owner, weights=seen, minlength=len(places))
        total = np.bincount(owner, minlength=len(places))
        leaking = (held > 0) & (held >= share * total)
        chosen = np.flatnonzero(seen & leaking[owner])
        last = np.searchsorted(ours, theirs[chosen], side="right")
        for gram, end in zip(chosen, last, strict=True):
            rows = found.setdefault(int(places[owner[gram]]), set())
            rows.update(passage[first[gram] : end].tolist())
    return found
