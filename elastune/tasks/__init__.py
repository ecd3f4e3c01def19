"""Benchmarks: one file each, one line each in ``TASKS``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from elastune.errors import BadRecipe, nearest
from elastune.tasks.base import Example, Score, Task, TaskContext, normalise
from elastune.tasks.commonsense import (
    PIQA,
    ARCChallenge,
    ARCEasy,
    BoolQ,
    CommonsenseInstruct,
    CommonsenseTask,
    HellaSwag,
    OpenBookQA,
    SocialIQa,
    WinoGrande,
)
from elastune.tasks.custom import Custom
from elastune.tasks.glue import (
    MNLI,
    MRPC,
    QNLI,
    QQP,
    RTE,
    SST2,
    STSB,
    CoLA,
    MNLIMismatched,
)
from elastune.tasks.gsm8k import GSM8K
from elastune.tasks.maths import (
    MAWPS,
    SVAMP,
    AddSub,
    AQuA,
    MathInstruct,
    MultiArith,
    SingleEq,
)
from elastune.tasks.perplexity import Perplexity
from elastune.tasks.reasoning_gym import ReasoningGym
from elastune.tasks.sources import JSON_SUFFIXES, TABLE_SUFFIXES, TEXT_SUFFIXES
from elastune.tasks.squad import SQuAD, SQuADv2
from elastune.tasks.user_classification import UserClassification, UserRegression
from elastune.tasks.user_questions import UserExtractiveQA, UserMultipleChoice

__all__ = ["TASKS", "Example", "Score", "Task", "TaskContext", "get_task", "normalise"]

TASKS: dict[str, type[Task]] = {
    "gsm8k": GSM8K,
    "math_instruct": MathInstruct,
    "aqua": AQuA,
    "addsub": AddSub,
    "multiarith": MultiArith,
    "singleeq": SingleEq,
    "svamp": SVAMP,
    "mawps": MAWPS,
    "boolq": BoolQ,
    "piqa": PIQA,
    "siqa": SocialIQa,
    "hellaswag": HellaSwag,
    "winogrande": WinoGrande,
    "arc_easy": ARCEasy,
    "arc_challenge": ARCChallenge,
    "openbookqa": OpenBookQA,
    "commonsense_instruct": CommonsenseInstruct,
    "sst2": SST2,
    "cola": CoLA,
    "mrpc": MRPC,
    "rte": RTE,
    "stsb": STSB,
    "qnli": QNLI,
    "qqp": QQP,
    "mnli": MNLI,
    "mnli_mm": MNLIMismatched,
    "squad": SQuAD,
    "squad_v2": SQuADv2,
    "wikitext2": Perplexity,
    "perplexity": Perplexity,
    "reasoning_gym": ReasoningGym,
    "custom": Custom,
    "classification": UserClassification,
    "regression": UserRegression,
    "multiple_choice": UserMultipleChoice,
    "extractive_qa": UserExtractiveQA,
}
USER_TASKS = ("custom", "classification", "regression", "multiple_choice", "extractive_qa")
"""Those whose argument is the source of a user's own rows."""
_Word = str | int | float | bool
_LABELS = Sequence[_Word] | Mapping[_Word, _Word] | None
"""YAML reads labels such as 0 and no as numbers and booleans."""
TAKES_ARGUMENT = (
    "perplexity",
    "reasoning_gym",
    *USER_TASKS,
    *(name for name, task in TASKS.items() if issubclass(task, CommonsenseTask)),
)


def get_task(
    name: str,
    *,
    data_dir: Path | None = None,
    template: str | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> Task:
    """Return the task called ``name``.

    Args:
        name: a name of ``TASKS``, with an argument after a colon where it takes one
            (``reasoning_gym:chain_sum``, ``perplexity:notes.txt``, ``piqa:likelihood``,
            ``classification:reviews.csv``, ``custom:hub:owner/name``); or the path of a
            .jsonl/.json file (a custom task) or .txt file (perplexity).
        data_dir: folder of local data sets; None reads from the hub.
        template: ``alpaca``, ``qa``, ``chat`` or ``none``; None is the task's own default
            (``alpaca``, but ``qa`` for reasoning_gym and ``none`` for perplexity).
        tokenizer: needed by chat prompts alone.
        options: the task's own.

    Raises:
        BadRecipe: unknown task, template or option.
        BadData: a package the task needs is missing.
    """
    base, _, argument = name.partition(":")
    if base not in TASKS:
        if name.endswith(JSON_SUFFIXES):
            base, argument = "custom", name
        elif name.endswith(TEXT_SUFFIXES):
            base, argument = "perplexity", name
        elif name.endswith(TABLE_SUFFIXES):
            raise BadRecipe(
                f"task {name!r} is a table, but nothing says what to learn from it.",
                try_=" or ".join(f"{prefix}:{name}" for prefix in USER_TASKS),
            )
        else:
            raise BadRecipe(
                f"task {name!r} is not known{nearest(base, TASKS)}; allowed: {', '.join(TASKS)}, "
                "or the path of a .jsonl, .json or .txt file (also .gz).",
            )
    if argument and base not in TAKES_ARGUMENT:
        raise BadRecipe(
            f"task {base!r} takes no argument, but {argument!r} was given.", try_=f"task: {base}"
        )
    task_class = TASKS[base]
    _check_options(base, task_class, options)
    return task_class(TaskContext(argument, data_dir, template, tokenizer), **options)


def _check_options(name: str, task_class: type[Task], options: dict[str, Any]) -> None:
    parameters = inspect.signature(task_class).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        _check_kinds(name, task_class, options)
        return
    allowed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in allowed:
            raise BadRecipe(
                f"task {name!r} has no option {option!r}{nearest(option, allowed)}; "
                f"allowed: {', '.join(allowed)}."
            )
    _check_kinds(name, task_class, options)


def _check_kinds(name: str, task_class: type[Task], options: dict[str, Any]) -> None:
    """Refuse options whose values are of another kind than the task's signature says."""
    hints: dict[str, Any] = get_type_hints(task_class.__init__)
    for option, value in options.items():
        hint: Any = _LABELS if option == "labels" else hints.get(option, Any)
        try:
            TypeAdapter(hint).validate_python(value, strict=True)
        except ValidationError as error:
            first = error.errors()[0]["msg"].lower()
            raise BadRecipe(
                f"task {name!r}: option {option!r} cannot be {str(value)[:80]!r}: {first}",
                try_="the documentation of the task: docs/tasks.md",
            ) from error
