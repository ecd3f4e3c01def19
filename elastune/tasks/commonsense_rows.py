"""Rows of the commonsense sets as LLM-Adapters words them: an instruction that lists its choices.

LLM-Adapters: Hu et al., EMNLP 2023 (arXiv 2304.01933).
"""

from __future__ import annotations

from dataclasses import dataclass

from elastune.errors import BadData
from elastune.tasks.sources import Row

_FORMAT = "Answer format: "
_LISTED = "\n\n"  # between the question and its choices


@dataclass(frozen=True)
class Question:
    """A question with its choices, apart.

    Attributes:
        text: the question, or the text to be continued or completed.
        choices: their texts.
        gold: index of the right one.
        context: another text beside it: BoolQ's passage, or HellaSwag's text as the harness has
            it; empty where the row has none.
    """

    text: str
    choices: tuple[str, ...]
    gold: int
    context: str = ""


@dataclass(frozen=True)
class Wording:
    """How the instructions of a data set are worded, for writing and for reading them.

    Attributes:
        lead: text before the question.
        choice: name of a choice; its number follows. Empty: the choices are not listed.
        between: text between two choices.
        before_format: text between the last choice and the answer format.
        names: of the answers, where these are not ``choice`` and a number.
    """

    lead: str
    choice: str
    between: str = " "
    before_format: str = "\n\n"
    names: tuple[str, ...] = ()

    def answers(self, n: int) -> tuple[str, ...]:
        """Return the names of ``n`` answers, e.g. ``answer1``, ``answer2``."""
        return self.names or tuple(f"{self.choice}{i}".lower() for i in range(1, n + 1))

    def write(self, question: Question) -> str:
        """Return the instruction."""
        listed = ""
        if self.choice:
            choices = enumerate(question.choices, start=1)
            parts = self.between.join(f"{self.choice}{i}: {text}" for i, text in choices)
            listed = f"{_LISTED}{parts}"
        answers = "/".join(self.answers(len(question.choices)))
        return f"{self.lead}{question.text}{listed}{self.before_format}{_FORMAT}{answers}"

    def read(self, row: Row) -> Question:
        """Return the question of a row with ``instruction`` and ``answer``.

        Raises:
            BadData: the instruction is worded otherwise, or the answer is none of its choices.
        """
        body, mark, listed = row.text("instruction").rpartition(_FORMAT)
        names = tuple(listed.strip().split("/"))
        framed = body.startswith(self.lead) and body.endswith(self.before_format)
        if not (mark and framed and names == self.answers(len(names))):
            raise self._unreadable(row, f"it must start with {self.lead!r} and end in the answers")
        body = body.removeprefix(self.lead).removesuffix(self.before_format)
        parts = [body, *names]
        if self.choice:
            parts = self._split(body, len(names))
            if not parts:
                raise self._unreadable(row, f"it must list {len(names)} choices, each once")
        answer = row.text("answer")
        if answer not in names:
            raise BadData(f"{row.place}: answer {answer!r} is not one of {', '.join(names)}.")
        return Question(parts[0], tuple(parts[1:]), names.index(answer))

    def _unreadable(self, row: Row, why: str) -> BadData:
        return BadData(
            f"{row.place}: the instruction cannot be read for its choices; {why}.",
            try_="use `by: generation`, which takes instructions as they are",
        )

    def _split(self, body: str, n: int) -> list[str]:
        """Return question and ``n`` choices; [] when one is missing or named twice."""
        marks = [f"{self.between if i > 1 else _LISTED}{self.choice}{i}: " for i in range(1, n + 1)]
        if any(body.count(mark) != 1 for mark in marks):
            return []
        parts, rest = [], body
        for mark in marks:
            part, found, rest = rest.partition(mark)
            if not found:
                return []
            parts.append(part)
        return [*parts, rest]


ANSWER = Wording("Please choose the correct answer to the question: ", "Answer")
SOLUTION = Wording(
    "Please choose the correct solution to the question: ", "Solution", between="\n\n"
)
ENDING = Wording("Please choose the correct ending to complete the given sentence: ", "Ending")
OPTION = Wording(
    "Please choose the correct answer to fill in the blank to complete the given sentence: ",
    "Option",
    before_format=" ",
)
TRUTH = Wording(
    "Please answer the following question with true or false, question: ",
    "",
    names=("true", "false"),
)
