"""What a benchmark is: examples, one prompt for training and evaluation, and a metric."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from elastune.errors import BadData
from elastune.tasks.prompts import Template, make_template

Kind = Literal["generation", "perplexity"]

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


@dataclass(frozen=True)
class Score:
    """A measured quality.

    Attributes:
        value: accuracy as a fraction in [0, 1], or perplexity.
        stderr: one standard error of ``value``, same unit.
        n: scored examples (accuracy) or predicted tokens (perplexity).
        seconds: wall time of the measurement.
    """

    task: str
    metric: str
    value: float
    stderr: float
    n: int
    higher_is_better: bool
    seconds: float


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
    """

    name: str
    metric: str = "accuracy"
    unit: str = "fraction"
    higher_is_better: bool = True
    kind: Kind = "generation"
    max_new_tokens: int = 256
    default_template: ClassVar[str] = "alpaca"

    def __init__(self, context: TaskContext, *, max_new_tokens: int | None = None) -> None:
        self.context = context
        name = context.template or self.default_template
        self.template: Template = make_template(name, context.tokenizer)
        if max_new_tokens is not None:
            self.max_new_tokens = max_new_tokens

    @abstractmethod
    def train_examples(self) -> list[Example]:
        """Return the training split.

        Raises:
            BadData: the task has none, or its data cannot be read.
        """

    @abstractmethod
    def report_examples(self) -> list[Example]:
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

    def score(self, text: str, example: Example) -> float:
        """Return the score of one answer in [0, 1]; the metric is the mean over examples."""
        return float(self.is_correct(text, example))

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
