"""The eight commonsense sets of LLM-Adapters, LoNAS and Shears, scored in either of two ways.

``by: generation`` is LLM-Adapters' (Hu et al., EMNLP 2023): the model writes "the correct answer
is answer3". ``by: likelihood`` takes the most likely choice, worded as lm-evaluation-harness
(Gao et al., 2024) words these sets. The two are different measures: compare like with like.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

from elastune.errors import BadData, BadRecipe, nearest
from elastune.metrics import ACCURACY, ACCURACY_NORM
from elastune.tasks.base import AnyExample, Example, MultipleChoiceExample, Task, TaskContext
from elastune.tasks.base import normalise as normalised
from elastune.tasks.commonsense_rows import (
    ANSWER,
    ENDING,
    OPTION,
    SOLUTION,
    TRUTH,
    Question,
    Wording,
)
from elastune.tasks.prompts import refuse_template
from elastune.tasks.sources import Row, hub_rows, local_file, read_rows

WAYS = ("generation", "likelihood")
FOLDER = "commonsense_eval"
_BRACKETS = re.compile(r"\[.*?\]")


class CommonsenseTask(Task):
    """One of the eight sets; local files hold its test rows, the hub its training rows, too.

    The argument may be ``generation`` or ``likelihood``: ``piqa:likelihood`` is the same as the
    option ``by``.

    Args:
        by: ``generation``: the answer is the first "answer3" (or "true", ...) in the generated
            text, as LLM-Adapters' evaluator has it. ``likelihood``: the choice with the highest
            log-likelihood; ``accuracy_norm`` divides it by the choice's length.

    Attributes:
        file: name of the local file, LLM-Adapters' name of the set.
        wording: of its instructions.
        pattern: finds the answer in generated text.
        hub: repository, subset and report split.
        published: rows of the official report split.
    """

    max_new_tokens = 32
    file: ClassVar[str]
    wording: ClassVar[Wording] = ANSWER
    pattern: ClassVar[re.Pattern[str]] = re.compile("answer[1-5]")
    hub: ClassVar[tuple[str, str | None, str]]
    published: ClassVar[int]

    def __init__(
        self,
        context: TaskContext,
        *,
        by: str | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        super().__init__(context, max_new_tokens=max_new_tokens)
        way = by or context.argument or WAYS[0]
        if way not in WAYS or (context.argument and way != context.argument):
            given = " and ".join(repr(given) for given in (context.argument, by) if given)
            raise BadRecipe(
                f"task {self.name!r} is to be scored by {given}{nearest(way, WAYS)}; "
                f"allowed: one of {', '.join(WAYS)}."
            )
        if way == "likelihood":
            refuse_template(context.template, f"{self.name}:likelihood")
            self.name = f"{self.name}:likelihood"
            self.kind = "multiple-choice"
            self.metrics = (ACCURACY, ACCURACY_NORM)

    @property
    def notes(self) -> str:
        """Says when the local rows are fewer than the published ones."""
        if self.context.data_dir is None or len(self._local_rows) == self.published:
            return ""
        return f"report split has {len(self._local_rows)} of the {self.published} published rows"

    def train_examples(self) -> Sequence[AnyExample]:
        if self.context.data_dir is not None:
            raise self.lacks(
                "training",
                "train on commonsense_instruct and report on this task; or leave out "
                "data_dir: the hub has its training split",
            )
        return [self._from_hub(row) for row in self._hub_rows("train")]

    def report_examples(self) -> Sequence[AnyExample]:
        if self.context.data_dir is None:
            return [self._from_hub(row) for row in self._hub_rows(self.hub[2])]
        return [self._from_local(row) for row in self._local_rows]

    def is_finished(self, text: str) -> bool:
        return super().is_finished(text) or self.pattern.search(text) is not None

    def extract(self, text: str) -> str | None:
        match = self.pattern.search(self.template.cut(text))
        return match[0] if match else None

    def question(self, row: Row) -> Question:
        """Return the question of a hub row."""
        raise NotImplementedError

    def choices(self, question: Question) -> tuple[str, tuple[str, ...], tuple[int, ...] | None]:
        """Return prompt, choices and where their scored part starts (`MultipleChoiceExample`)."""
        return f"Question: {question.text}\nAnswer:", _spaced(question.choices), None

    def local_question(self, row: Row) -> Question:
        """Return the question of a local row."""
        return self.wording.read(row)

    @cached_property
    def _local_rows(self) -> list[Row]:
        assert self.context.data_dir is not None
        folder = self.context.data_dir / FOLDER
        path = local_file(folder, self.file)
        if path is None:
            raise BadData(
                f"task {self.name!r} finds no file {self.file}.jsonl.gz in {folder}.",
                try_="put it there; without data_dir the rows are read from the hub",
            )
        return read_rows(path)

    def _hub_rows(self, split: str) -> list[Row]:
        repo, subset, _ = self.hub
        return hub_rows(repo, subset=subset, split=split)

    def _from_local(self, row: Row) -> AnyExample:
        if self.kind == "generation":
            return taught(self, row)
        return self._multiple_choice(self.local_question(row), row.text("instruction"))

    def _from_hub(self, row: Row) -> AnyExample:
        question = self.question(row)
        if not 0 <= question.gold < len(question.choices):
            raise BadData(
                f"{row.place}: the right choice is number {question.gold} (from 0) of "
                f"{len(question.choices)}.",
                try_="use a split with gold answers",
            )
        instruction = self.wording.write(question)
        if self.kind != "generation":
            return self._multiple_choice(question, instruction)
        answer = self.wording.answers(len(question.choices))[question.gold]
        return self.example(instruction, f"the correct answer is {answer}", answer)

    def _multiple_choice(self, question: Question, instruction: str) -> MultipleChoiceExample:
        prompt, choices, scored_from = self.choices(question)
        return MultipleChoiceExample(prompt, choices, question.gold, instruction, scored_from)


class BoolQ(CommonsenseTask):
    """BoolQ: yes or no (Clark et al., 2019). LLM-Adapters' rows lack the passage; the hub's not."""

    name = "boolq"
    file = "boolq"
    wording = TRUTH
    pattern = re.compile("true|false")
    hub = ("google/boolq", None, "validation")
    published = 3270

    @property
    def notes(self) -> str:
        """Says, too, that the question stands without its passage."""
        if self.context.data_dir is None or self.kind == "generation":
            return super().notes
        return "; ".join(filter(None, (super().notes, "questions stand without their passage")))

    def question(self, row: Row) -> Question:
        text = row.text("question").rstrip(" ?") + "?"
        return Question(
            text, self.wording.names, 0 if row.get("answer") else 1, row.text("passage")
        )

    def choices(self, question: Question) -> tuple[str, tuple[str, ...], None]:
        passage = f"{question.context}\n" if question.context else ""
        return f"{passage}Question: {question.text}\nAnswer:", (" yes", " no"), None


class PIQA(CommonsenseTask):
    """PIQA: which solution reaches the goal? (Bisk et al., 2020)."""

    name = "piqa"
    file = "piqa"
    wording = SOLUTION
    pattern = re.compile("solution[12]")
    hub = ("baber/piqa", None, "validation")
    published = 1838

    def question(self, row: Row) -> Question:
        choices = (row.text("sol1"), row.text("sol2"))
        return Question(row.text("goal"), choices, int(row.get("label")))


class SocialIQa(CommonsenseTask):
    """Social IQa: what people do, want and feel (Sap et al., 2019)."""

    name = "siqa"
    file = "social_i_qa"
    hub = ("lighteval/siqa", None, "validation")
    published = 1954

    def question(self, row: Row) -> Question:
        choices = tuple(row.text(f"answer{letter}") for letter in "ABC")
        text = f"{row.text('context')} {row.text('question')}"
        return Question(text, choices, int(row.get("label")) - 1)

    def choices(self, question: Question) -> tuple[str, tuple[str, ...], None]:
        return f"Q: {question.text}\nA:", _spaced(question.choices), None


class HellaSwag(CommonsenseTask):
    """HellaSwag: which ending follows? (Zellers et al., 2019)."""

    name = "hellaswag"
    file = "hellaswag"
    wording = ENDING
    pattern = re.compile("ending[1-4]")
    hub = ("Rowan/hellaswag", None, "validation")
    published = 10042

    @property
    def notes(self) -> str:
        """Says, too, when the texts lack the activity that stands before them in HellaSwag."""
        if self.context.data_dir is None or "activity_label" in self._local_rows[0].values:
            return super().notes
        return "; ".join(filter(None, (super().notes, "texts lack their activity label")))

    def question(self, row: Row) -> Question:
        activity = row.text("activity_label")
        label = row.text("label")  # empty in the test split
        return Question(
            f"{activity}: {row.text('ctx')}",
            tuple(row.get("endings")),
            int(label) if label else -1,
            f"{activity}: {row.text('ctx_a')} {row.text('ctx_b').capitalize()}",
        )

    def local_question(self, row: Row) -> Question:
        if "endings" not in row.values:
            return self.wording.read(row)
        activity = row.values.get("activity_label")
        text = f"{activity}: {row.text('ctx')}" if activity else row.text("ctx")
        endings, label = tuple(row.get("endings")), row.get("label")
        if label not in range(len(endings)):
            raise BadData(
                f"{row.place}: label {label!r} is not the number of an ending (from 0).",
                try_="number endings from 0, or a letter",
            )
        return Question(text, endings, label)

    def choices(self, question: Question) -> tuple[str, tuple[str, ...], None]:
        text = _without_marks(question.context or question.text)
        return text, _spaced(map(_without_marks, question.choices)), None


class WinoGrande(CommonsenseTask):
    """WinoGrande: who is meant? Scored is the sentence's end (Sakaguchi et al., 2020)."""

    name = "winogrande"
    file = "winogrande"
    wording = OPTION
    pattern = re.compile("option[12]")
    hub = ("allenai/winogrande", "winogrande_xl", "validation")
    published = 1267

    def question(self, row: Row) -> Question:
        choices = (row.text("option1"), row.text("option2"))
        answer = row.text("answer")  # empty in the test split
        return Question(row.text("sentence"), choices, int(answer) - 1 if answer else -1)

    def choices(self, question: Question) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
        before, blank, after = question.text.partition("_")
        if not blank:
            raise BadData(
                f"the winogrande sentence {question.text!r} has no blank (_).",
                try_="mark the place of the options with _",
            )
        prompt = before.rstrip()
        filled = [before[len(prompt) :] + choice for choice in question.choices]
        choices = tuple(f"{text} {after.strip()}" for text in filled)
        return prompt, choices, tuple(map(len, filled))


class ARCEasy(CommonsenseTask):
    """ARC, the easy questions: grade-school science (Clark et al., 2018)."""

    name = "arc_easy"
    file = "ARC-Easy"
    hub = ("allenai/ai2_arc", "ARC-Easy", "test")
    published = 2376

    def question(self, row: Row) -> Question:
        return lettered(row, row.text("question"))


class ARCChallenge(ARCEasy):
    """ARC, the questions that word statistics do not answer (Clark et al., 2018)."""

    name = "arc_challenge"
    file = "ARC-Challenge"
    hub = ("allenai/ai2_arc", "ARC-Challenge", "test")
    published = 1172


class OpenBookQA(CommonsenseTask):
    """OpenBookQA: elementary science facts applied (Mihaylov et al., 2018)."""

    name = "openbookqa"
    file = "openbookqa"
    hub = ("allenai/openbookqa", "main", "test")
    published = 500

    def question(self, row: Row) -> Question:
        return lettered(row, row.text("question_stem"))

    def choices(self, question: Question) -> tuple[str, tuple[str, ...], None]:
        return question.text, _spaced(question.choices), None


class CommonsenseInstruct(Task):
    """Instruction tuning on LLM-Adapters' training rows; reported on by the eight sets.

    Rows whose question, with its choices, is in one of the local test sets are left out.
    """

    name = "commonsense_instruct"
    max_new_tokens = 32
    pattern: ClassVar[re.Pattern[str]] = re.compile(
        "|".join(task.pattern.pattern for task in (BoolQ, PIQA, ARCEasy, HellaSwag, WinoGrande))
    )

    def train_examples(self) -> list[Example]:
        root = self.context.data_dir
        path = None if root is None else local_file(root / "commonsense_instruct", "train")
        if root is None or path is None:
            raise BadData(
                "task 'commonsense_instruct' has no known source on the hub"
                + (f", and {root} has no commonsense_instruct/train.jsonl.gz." if root else "."),
                try_="give data_dir: a folder with commonsense_instruct/train.jsonl.gz; "
                "or train on a file of your own (custom:PATH)",
            )
        files = sorted((root / FOLDER).glob("*.jsonl.gz"))
        tested = {normalised(row.text("instruction")) for f in files for row in read_rows(f)}
        rows = (r for r in read_rows(path) if normalised(r.text("instruction")) not in tested)
        return [taught(self, row) for row in rows]

    def report_examples(self) -> list[Example]:
        raise self.lacks(
            "report",
            "report on boolq, piqa, siqa, hellaswag, winogrande, arc_easy, "
            "arc_challenge or openbookqa",
        )

    def is_finished(self, text: str) -> bool:
        return super().is_finished(text) or self.pattern.search(text) is not None

    def extract(self, text: str) -> str | None:
        match = self.pattern.search(self.template.cut(text))
        return match[0] if match else None


def taught(task: Task, row: Row) -> Example:
    """Return the example of a row in LLM-Adapters' format."""
    return task.example(row.text("instruction"), row.text("output"), row.text("answer"))


def lettered(row: Row, text: str) -> Question:
    """Return the question of a row with ``choices`` {text, label} and ``answerKey``."""
    choices, key = row.get("choices"), row.text("answerKey").strip()
    labels = list(choices["label"])
    return Question(text, tuple(choices["text"]), labels.index(key) if key in labels else -1)


def _spaced(choices: Sequence[str] | map[str]) -> tuple[str, ...]:
    return tuple(f" {choice}" for choice in choices)


def _without_marks(text: str) -> str:
    """Return a HellaSwag text without WikiHow's marks such as [title]."""
    text = _BRACKETS.sub("", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
