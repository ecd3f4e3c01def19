"""A user's own rows: where they come from, what their columns are called, how they are split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from elastune.errors import BadData, BadRecipe, nearest
from elastune.metrics import METRICS, Metric
from elastune.tasks.base import AnyExample, TaskContext, normalise
from elastune.tasks.sources import Row, hub_rows, read_rows

HUB = "hub:"
ExampleT = TypeVar("ExampleT", bound=AnyExample)


class UserData(Generic[ExampleT]):
    """The examples of a file (``PATH``) or of a hub data set (``hub:ID``), and their two splits.

    Args:
        prefix: the task's name before the colon, for messages.
        context: its argument is the source; a path may be relative to ``data_dir``.
        roles: what the task reads of a row.
        from_row: makes an example.
        fields: role -> the data's own name of it, e.g. ``{prompt: question}``.
        report: file (or hub split) of the report set; without it ``holdout`` applies.
        holdout: share of different questions kept for the report set, chosen by their text.
        split: hub split to train on.
        subset: hub configuration.

    Attributes:
        name: prefix and source, of a file without the folders.
        names: role -> field.
    """

    def __init__(
        self,
        prefix: str,
        context: TaskContext,
        roles: Sequence[str],
        from_row: Callable[[Row], ExampleT],
        *,
        fields: Mapping[str, str] | None,
        report: str | None,
        holdout: float,
        split: str,
        subset: str | None,
    ) -> None:
        self.source = context.argument
        if not self.source or self.source == HUB:
            raise BadRecipe(
                f"task {prefix!r} needs a path or hub id.",
                try_=f"{prefix}:train.jsonl, or {prefix}:{HUB}owner/name",
            )
        for role in fields or {}:
            if role not in roles:
                raise BadRecipe(
                    f"fields names {role!r}{nearest(role, roles)}; allowed: {', '.join(roles)}."
                )
        if not 0 <= holdout < 1:
            raise BadRecipe(f"holdout is {holdout}; it must be at least 0 and below 1.")
        is_hub = self.source.startswith(HUB)
        self.name = f"{prefix}:{self.source if is_hub else Path(self.source).name}"
        self.names = {role: (fields or {}).get(role, role) for role in roles}
        self._data_dir, self._from_row = context.data_dir, from_row
        self._report, self._holdout = report, holdout
        self._split, self._subset = split, subset

    def train(self) -> list[ExampleT]:
        """Return the training examples: all but what is held out for the report."""
        if self._report is not None:
            return self.all
        return [e for e in self.all if _share(e.key) >= self._holdout]

    def report(self) -> list[ExampleT]:
        """Return the report examples.

        Raises:
            BadData: no question is held out.
        """
        if self._report is not None:
            return [self._from_row(row) for row in self._rows(self._report, is_report=True)]
        kept = [e for e in self.all if _share(e.key) < self._holdout]
        if not kept:
            raise BadData(
                f"task {self.name!r} has no report examples.",
                try_="raise `holdout`, or name a file with the option `report`",
            )
        return kept

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of the source, held-out ones included."""
        return self._rows(self.source, is_report=False)

    @cached_property
    def all(self) -> list[ExampleT]:
        """The examples of the source, held-out ones included."""
        return [self._from_row(row) for row in self.rows]

    def _rows(self, source: str, *, is_report: bool) -> list[Row]:
        if self.source.startswith(HUB):
            split = source if is_report else self._split
            return hub_rows(self.source.removeprefix(HUB), subset=self._subset, split=split)
        try:
            path = Path(source).expanduser()
        except RuntimeError as error:  # ~name of nobody
            raise BadRecipe(
                f"there is no folder {source!r}: {error}", try_="a file, or hub:OWNER/NAME"
            ) from error
        if self._data_dir is not None and not path.exists():
            path = self._data_dir / path
        return read_rows(path)


def chosen_metrics(
    names: str | Sequence[str] | None, allowed: tuple[Metric, ...]
) -> tuple[Metric, ...]:
    """Return the metrics called ``names``; the first is what a search optimises.

    Raises:
        BadRecipe: a name is not among ``allowed``, or none is given.
    """
    if names is None:
        return allowed
    names = [names] if isinstance(names, str) else list(names)
    known = [metric.name for metric in allowed]
    for name in names:
        if name not in known:
            raise BadRecipe(
                f"metrics names {name!r}{nearest(name, known)}; allowed: {', '.join(known)}."
            )
    if not names:
        raise BadRecipe(f"metrics is empty; allowed: {', '.join(known)}.")
    return tuple(METRICS[name] for name in dict.fromkeys(names))


def _share(key: str) -> float:
    """Return a number in [0, 1) that depends on the question's text alone.

    Repeated questions fall on one side, and adding rows moves no other row.
    """
    digest = hashlib.sha256(json.dumps(normalise(key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
