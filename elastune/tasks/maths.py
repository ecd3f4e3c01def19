"""Maths word problems as in LLM-Adapters, LoNAS and Shears: six test sets, one training set.

LLM-Adapters (Hu et al., EMNLP 2023) defined the sets, the prompt and the judging of answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from elastune.errors import BadData
from elastune.tasks.answers import CHOICE, NUMBER, Judge
from elastune.tasks.base import Example, Task, normalise
from elastune.tasks.sources import Row, hub_rows, read_rows

_TRAIN_ON = "train on gsm8k or math_instruct and report on this task"
LETTERS = frozenset("ABCDE")


class MathTask(Task):
    """Judge the number (tolerance 1e-3) or the letter that generated text gives as the answer."""

    judge: ClassVar[Judge] = NUMBER

    def is_finished(self, text: str) -> bool:
        return super().is_finished(text) or self.judge.is_final(text)

    def extract(self, text: str) -> str | None:
        return self.judge.extract(self.template.cut(text))

    def is_correct(self, text: str, example: Example) -> bool:
        return self.judge.is_same(self.extract(text), example.answer)

    def local(self, *parts: str) -> Path | None:
        """Return the path of a local data file, or None when data comes from the hub."""
        return None if self.context.data_dir is None else self.context.data_dir.joinpath(*parts)


class MathTestSet(MathTask):
    """One of LLM-Adapters' test sets, without training data of its own."""

    file: ClassVar[str]

    def train_examples(self) -> list[Example]:
        raise self.lacks("training", _TRAIN_ON)

    def report_examples(self) -> list[Example]:
        path = self.local("math_eval", f"{self.file}.jsonl.gz")
        if path is None:
            return [self.from_hub(row) for row in self.hub()]
        return [self.example(r.text("instruction"), "", r.text("answer")) for r in read_rows(path)]

    def hub(self) -> list[Row]:
        """Return the test rows from the hub; overridden by sets known to be there."""
        raise BadData(
            f"task {self.name!r} has no known source on the hub.",
            try_=f"give data_dir: a folder with math_eval/{self.file}.jsonl.gz",
        )

    def from_hub(self, row: Row) -> Example:
        """Return the example of a hub row."""
        raise NotImplementedError


class AQuA(MathTestSet):
    """AQuA-RAT: algebra with five choices (Ling et al., 2017)."""

    name = "aqua"
    file = "AQuA"
    judge = CHOICE

    def hub(self) -> list[Row]:
        return hub_rows("deepmind/aqua_rat", subset="raw", split="test")

    def from_hub(self, row: Row) -> Example:
        # Options come as "A)23.65"; the local files spell them "(A) 23.65".
        options = " ".join(f"({o[0]}) {o[2:].strip()}" for o in row.get("options"))
        question = f"{row.text('question')} Answer Choices: {options}"
        return self.example(question, "", row.text("correct"))


class AddSub(MathTestSet):
    """AddSub: additions and subtractions (Hosseini et al., 2014)."""

    name = "addsub"
    file = "AddSub"


class MultiArith(MathTestSet):
    """MultiArith: several steps of arithmetic (Roy and Roth, 2015)."""

    name = "multiarith"
    file = "MultiArith"

    def hub(self) -> list[Row]:
        return hub_rows("ChilleD/MultiArith", split="train+test")  # all 600, as in LLM-Adapters

    def from_hub(self, row: Row) -> Example:
        return self.example(row.text("question").strip(), "", row.text("final_ans"))


class SingleEq(MathTestSet):
    """SingleEq: problems of one equation (Koncel-Kedziorski et al., 2015)."""

    name = "singleeq"
    file = "SingleEq"


class SVAMP(MathTestSet):
    """SVAMP: varied elementary problems (Patel et al., 2021)."""

    name = "svamp"
    file = "SVAMP"

    def hub(self) -> list[Row]:
        return hub_rows("ChilleD/SVAMP", split="train+test")  # all 1,000, as in LLM-Adapters

    def from_hub(self, row: Row) -> Example:
        body = row.text("Body").strip()
        stop = "" if body.endswith((".", "?", "!", ",")) else "."
        return self.example(f"{body}{stop} {row.text('Question')}", "", row.text("Answer"))


class MAWPS(MathTestSet):
    """MAWPS, the parent of AddSub, MultiArith and SingleEq (Koncel-Kedziorski et al., 2016)."""

    name = "mawps"
    file = "mawps"


class MathInstruct(MathTask):
    """Instruction tuning on GSM8K, MAWPS and AQuA rationales; reported on by the other sets.

    Rows whose question is in one of the local test sets are left out.
    """

    name = "math_instruct"

    def train_examples(self) -> list[Example]:
        path = self.local("math_instruct", "train.jsonl.gz")
        if path is None:
            raise BadData(
                "task 'math_instruct' has no known source on the hub.",
                try_="give data_dir: a folder with math_instruct/train.jsonl.gz; "
                "or train on gsm8k, or on a file of your own (custom:PATH)",
            )
        tested = self._test_questions()
        return [
            self.example(row.text("instruction"), row.text("output"), row.text("answer"))
            for row in read_rows(path)
            if normalise(row.text("instruction")) not in tested
        ]

    def _test_questions(self) -> frozenset[str]:
        """Return the normalised questions of all local test sets.

        MAWPS is the parent of three test sets: some of its training rows are test questions spelt
        with other blanks or commas.
        """
        folder = self.local("math_eval")
        files = sorted(folder.glob("*.jsonl.gz")) if folder is not None else []
        return frozenset(normalise(r.text("instruction")) for f in files for r in read_rows(f))

    def report_examples(self) -> list[Example]:
        raise self.lacks("report", f"report on gsm8k, {', '.join(TEST_SETS)}")

    def is_finished(self, text: str) -> bool:
        return super().is_finished(text) or CHOICE.is_final(text)

    def is_correct(self, text: str, example: Example) -> bool:
        judge = CHOICE if example.answer in LETTERS else NUMBER
        return judge.is_same(judge.extract(self.template.cut(text)), example.answer)

    def extract(self, text: str) -> str | None:
        text = self.template.cut(text)
        return CHOICE.extract(text) if CHOICE.is_final(text + " ") else NUMBER.extract(text)


TEST_SETS = ("aqua", "addsub", "multiarith", "singleeq", "svamp", "mawps")
