"""What a benchmark is: examples, one prompt for training and evaluation, and a metric."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from elastune.errors import BadData, BadRecipe
from elastune.metrics import ACCURACY, Metric
from elastune.tasks.prompts import Template, make_template

Kind = Literal[
    "generation",
    "perplexity",
    "multiple-choice",
    "classification",
    "regression",
    "question-answering",
]
HeadName = Literal["causal-lm", "sequence-classification", "question-answering"]

_HEAD_OF: dict[Kind, HeadName] = {
    "generation": "causal-lm",
    "perplexity": "causal-lm",
    "multiple-choice": "causal-lm",
    "classification": "sequence-classification",
    "regression": "sequence-classification",
    "question-answering": "question-answering",
}

_OPERATOR = re.compile(r"(?<=[\d)])\s*([-+*/^%=<>])\s*(?=[-\d(])")
# Private-use characters stand in for operators while punctuation is removed.
_PUNCTUATION = re.compile("[^\\w\\s\ue000-\ue008]|_")
_KEPT = {op: chr(0xE000 + i) for i, op in enumerate("-+*/^%=<>")}
_RESTORE = str.maketrans({mark: op for op, mark in _KEPT.items()})


@dataclass(frozen=True)
class Example:
    """One question with its answer, as text.

    Attributes:
        prompt: all text before the model's answer, template applied.
        completion: what training teaches after the prompt; ``""`` where the source has no answer
            text. Starts with a blank only where the template's prompt does not end the word.
        answer: the gold answer the metric compares with.
        key: the question itself, without template: tells whether two splits share it.
    """

    prompt: str
    completion: str
    answer: str
    key: str

    @property
    def plain_text(self) -> str:
        """Everything that a model reads of it, for calibration."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class MultipleChoiceExample:
    """A question whose answer is the most likely of given continuations.

    Attributes:
        prompt: text before a choice.
        choices: continuations as they follow the prompt, blank included.
        gold: index of the right one.
        key: the question itself, for leak checks.
        scored_from: character of each choice from which on its tokens are scored; what stands
            before belongs to the prompt. None scores whole choices. It is for choices that differ
            before a common ending (WinoGrande).
    """

    prompt: str
    choices: tuple[str, ...]
    gold: int
    key: str
    scored_from: tuple[int, ...] | None = None

    @property
    def completion(self) -> str:
        """What training teaches after the prompt: the right choice."""
        return self.choices[self.gold]

    @property
    def plain_text(self) -> str:
        """Everything that a model reads of it, for calibration."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class ClassificationExample:
    """A text, or a pair of texts, and its label.

    Attributes:
        text: first text.
        text_pair: second text, or None.
        label: class index (classification) or number (regression).
        key: both texts, for leak checks.
    """

    text: str
    text_pair: str | None
    label: float
    key: str

    @property
    def plain_text(self) -> str:
        """Everything that a model reads of it, for calibration."""
        return f"{self.text} {self.text_pair or ''}".rstrip()


@dataclass(frozen=True)
class QuestionAnsweringExample:
    """A question answered by a part of a context, or by nothing in it.

    Attributes:
        id: of the question.
        answers: gold answers' texts; empty when the context holds none (SQuAD v2).
        answer_start: index in ``context`` of the first character of each answer.
        key: question and context, for leak checks.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    answer_start: tuple[int, ...]
    key: str

    @property
    def plain_text(self) -> str:
        """Everything that a model reads of it, for calibration."""
        return f"{self.question} {self.context}"


AnyExample = Example | MultipleChoiceExample | ClassificationExample | QuestionAnsweringExample


@dataclass(frozen=True)
class Measured:
    """A metric's value.

    Attributes:
        value: in the metric's unit.
        stderr: one standard error, same unit.
        n: scored examples, or predicted tokens (perplexity).
    """

    metric: str
    value: float
    stderr: float
    n: int


@dataclass(frozen=True)
class Score:
    """A measured quality: the task's first metric, and the others beside it.

    Attributes:
        value: accuracy as a fraction in [0, 1], a correlation, or perplexity.
        stderr: one standard error of ``value``, same unit.
        n: scored examples (accuracy) or predicted tokens (perplexity).
        seconds: wall time of the measurement; of examples scored before a kill, too.
        others: the task's further metrics.
    """

    task: str
    metric: str
    value: float
    stderr: float
    n: int
    higher_is_better: bool
    seconds: float
    others: tuple[Measured, ...] = ()


@dataclass(frozen=True)
class TaskContext:
    """Where a task finds its data and how it words its prompts.

    Attributes:
        argument: what follows the colon of the task's name, e.g. ``chain_sum`` or a path.
        data_dir: folder of local data sets; None reads from the hub.
        template: name of the prompt template; None is the task's own default.
        tokenizer: needed by the ``chat`` template alone.
    """

    argument: str = ""
    data_dir: Path | None = None
    template: str | None = None
    tokenizer: Any = None


class Task(ABC):
    """A benchmark: where its examples come from and how an answer is judged.

    A new benchmark is a subclass in a file of its own and a line in ``TASKS``. Options of a task
    are keyword-only arguments of its ``__init__``.

    Attributes:
        kind: how examples are scored (`elastune.predict`), and so which head the model needs.
        metrics: what is reported; a search optimises the first.
    """

    name: str
    metrics: tuple[Metric, ...] = (ACCURACY,)
    kind: Kind = "generation"
    max_new_tokens: int = 256
    default_template: ClassVar[str] = "alpaca"

    def __init__(self, context: TaskContext, *, max_new_tokens: int | None = None) -> None:
        self.context = context
        name = context.template or self.default_template
        self.template: Template = make_template(name, context.tokenizer)
        if max_new_tokens is not None:
            if max_new_tokens < 1:
                raise BadRecipe(f"max_new_tokens must be at least 1, got {max_new_tokens}")
            self.max_new_tokens = max_new_tokens

    @property
    def head(self) -> HeadName:
        """The head that a model needs for this task."""
        return _HEAD_OF[self.kind]

    @property
    def num_labels(self) -> int | None:
        """Classes of a classification task; 1 for regression; None for other kinds."""
        return None

    @property
    def notes(self) -> str:
        """What a reader of this task's results must know; empty when nothing is unusual."""
        return ""

    @property
    def metric(self) -> str:
        """The name of the first metric."""
        return self.metrics[0].name

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value of the first metric is the better one."""
        return self.metrics[0].higher_is_better

    @abstractmethod
    def train_examples(self) -> Sequence[AnyExample]:
        """Return the training split.

        Raises:
            BadData: the task has none, or its data cannot be read.
        """

    @abstractmethod
    def report_examples(self) -> Sequence[AnyExample]:
        """Return the official test (or dev) split that results are reported on.

        Raises:
            BadData: the task has none, or its data cannot be read.
        """

    def is_finished(self, text: str) -> bool:
        """Tell whether generation may stop: nothing after ``text`` could change its score."""
        return self.template.has_stop(text)

    def extract(self, text: str) -> str | None:
        """Return the answer given in generated ``text``, or None when there is none."""
        return self.template.cut(text).strip() or None

    def is_correct(self, text: str, example: Example) -> bool:
        """Tell whether generated ``text`` answers ``example``."""
        return self.extract(text) == example.answer

    def example(self, question: str, completion: str, answer: str) -> Example:
        """Return an example worded by this task's template."""
        return Example(
            prompt=self.template.prompt(question),
            completion=self.template.completion(completion),
            answer=answer,
            key=question,
        )

    def lacks(self, split: str, try_: str) -> BadData:
        """Return the error for a split this task does not have."""
        return BadData(f"task {self.name!r} has no {split} examples.", try_=try_)


def normalise(text: str) -> str:
    """Return ``text`` for leak checks: lower case, without punctuation and runs of blanks.

    An operator between two numbers is kept: ``5 - 3`` and ``5 + 3`` are different questions.
    """
    marked = _OPERATOR.sub(lambda match: f" {_KEPT[match[1]]} ", text.lower())
    return " ".join(_PUNCTUATION.sub("", marked).translate(_RESTORE).split())
