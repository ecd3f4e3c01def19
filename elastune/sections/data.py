"""What a run learns and is scored on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from elastune.sections.base import Section, listed

_FILE_SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet")


def _shorthand(value: Any) -> Any:
    """Let ``task: gsm8k`` stand for ``task: {name: gsm8k}``."""
    return {"name": value} if isinstance(value, str) else value


class TaskConfig(Section):
    """A benchmark or a data set of the user's own."""

    name: str
    """A known task (``elastune doctor`` lists them), or the path of a .jsonl or .txt file."""
    template: str | None = None
    """How questions are worded: alpaca, qa, chat, none; by default the task's own."""
    limit: int | None = Field(None, ge=1)
    """Score at most this many report examples (drawn once, by a fixed seed)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The task's own options."""

    @property
    def label(self) -> str:
        """What results call the task: its name, of a file without the folders."""
        path = self.name.rpartition(":")[2]
        is_file = Path(path.removesuffix(".gz")).suffix in _FILE_SUFFIXES
        return Path(path).name if is_file else self.name


Task = Annotated[TaskConfig, BeforeValidator(_shorthand)]


class DataConfig(Section):
    """How the training side is cut. Report examples come from the tasks' own test sets."""

    dir: Path | None = None
    """Folder of local data sets; without it they come from the hub."""
    n_train: int | None = Field(None, ge=1)
    """Training examples; by default all that validation leaves."""
    n_validation: int = Field(64, ge=1)
    """Examples cut from the training side for the search."""
    leaks: Literal["refuse", "drop", "warn"] = "refuse"
    """What to do about training rows whose question is in a report set."""


class CalibrationConfig(Section):
    """Text that sparsifiers look at. Packed: every sequence has full length."""

    source: str = "task"
    """"task" (training examples), "c4", or the path of a text file."""
    n_sequences: int = Field(128, ge=1)
    length: int = Field(2048, ge=2)
    """Tokens a sequence; at most what the model can read."""


class EvaluateConfig(Section):
    """What is measured for the report, and on what."""

    tasks: Annotated[list[Task], BeforeValidator(listed)] = []
    """Benchmarks to report; by default the training task's own."""

    @field_validator("tasks")
    @classmethod
    def _differ(cls, tasks: list[TaskConfig]) -> list[TaskConfig]:
        labels = [task.label for task in tasks]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two tasks are called {label!r}; results could not tell them")
        return tasks

    batch_tokens: int = Field(8192, ge=1)
    """Tokens in one batch; lower it when memory runs out."""
    macs_length: int = Field(256, ge=1)
    """Tokens of the forward pass that MACs are counted for."""
    latency: bool = False
    """Measure the latency of that forward pass on this device, too."""
