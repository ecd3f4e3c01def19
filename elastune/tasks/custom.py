"""A user's own data: prompt/completion, chat or labelled texts, in a file or on the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from elastune.errors import BadData, BadRecipe, nearest
from elastune.tasks.answers import CHOICE, NUMBER, Judge
from elastune.tasks.base import Example, Task, TaskContext, normalise
from elastune.tasks.prompts import chat_prompt
from elastune.tasks.sources import Row, hub_rows, read_rows

ROLES = ("prompt", "completion", "answer", "messages", "text", "label")
MATCHES: dict[str, Judge | None] = {"exact": None, "number": NUMBER, "choice": CHOICE}
HUB = "hub:"


class Custom(Task):
    """Rows of a .jsonl/.json file (``custom:PATH``) or of a hub data set (``custom:hub:ID``).

    A row is one of: ``prompt`` + ``completion`` (and ``answer`` where the gold answer differs);
    ``messages``, whose last assistant turn is the completion; ``text`` + ``label``.

    Args:
        fields: role -> the data's own name of it, e.g. ``{prompt: question}``.
        labels: words for the labels: a list by number, or label -> word.
        match: how a generated answer is judged: ``exact`` (whole text, case ignored), ``number``
            or ``choice`` (a letter A-E), the last two as in the maths tasks.
        report: file (or hub split) of the report set; without it ``holdout`` applies.
        holdout: share of different questions kept for the report set, chosen by their text.
        split: hub split to train on.
        subset: hub configuration.
    """

    name = "custom"

    def __init__(
        self,
        context: TaskContext,
        *,
        fields: Mapping[str, str] | None = None,
        labels: Sequence[str] | Mapping[str, str] | None = None,
        match: str = "exact",
        report: str | None = None,
        holdout: float = 0.1,
        split: str = "train",
        subset: str | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        super().__init__(context, max_new_tokens=max_new_tokens)
        self.source = context.argument
        _check_options(self.source, fields or {}, match, holdout)
        self.name = (
            f"custom:{self.source if self.source.startswith(HUB) else Path(self.source).name}"
        )
        self.names = {role: (fields or {}).get(role, role) for role in ROLES}
        self.labels = labels
        self.judge = MATCHES[match]
        self.report, self.holdout = report, holdout
        self.split, self.subset = split, subset

    def train_examples(self) -> list[Example]:
        if self.report is not None:
            return self._all
        return [e for e in self._all if _share(e.key) >= self.holdout]

    def report_examples(self) -> list[Example]:
        if self.report is not None:
            return [self._from_row(row) for row in self._rows(self.report, is_report=True)]
        kept = [e for e in self._all if _share(e.key) < self.holdout]
        if not kept:
            raise self.lacks("report", "raise `holdout`, or name a file with the option `report`")
        return kept

    def is_finished(self, text: str) -> bool:
        if super().is_finished(text):
            return True
        if self.judge is not None:
            return self.judge.is_final(text)
        return not self._multiline and "\n" in text.lstrip()

    def extract(self, text: str) -> str | None:
        text = self.template.cut(text)
        if self.judge is not None:
            return self.judge.extract(text)
        text = text.strip()
        return (text if self._multiline else text.split("\n", 1)[0].rstrip()) or None

    def is_correct(self, text: str, example: Example) -> bool:
        given = self.extract(text)
        if self.judge is not None:
            return self.judge.is_same(given, example.answer)
        return given is not None and given.casefold() == example.answer.strip().casefold()

    @cached_property
    def _all(self) -> list[Example]:
        return [self._from_row(row) for row in self._rows(self.source, is_report=False)]

    @cached_property
    def _multiline(self) -> bool:
        return any("\n" in example.answer.strip() for example in self._all)

    def _rows(self, source: str, *, is_report: bool) -> list[Row]:
        if self.source.startswith(HUB):
            split = source if is_report else self.split
            return hub_rows(self.source.removeprefix(HUB), subset=self.subset, split=split)
        path = Path(source)
        if self.context.data_dir is not None and not path.exists():
            path = self.context.data_dir / path
        return read_rows(path)

    def _from_row(self, row: Row) -> Example:
        if self.names["messages"] in row.values:
            return self._from_messages(row)
        if self.names["text"] in row.values and self.names["prompt"] not in row.values:
            word = self._label_word(row)
            return self.example(row.text(self.names["text"]), word, word)
        prompt = row.text(self.names["prompt"])
        completion = row.text(self.names["completion"])
        answer = self.names["answer"]
        return self.example(
            prompt, completion, row.text(answer) if answer in row.values else completion
        )

    def _from_messages(self, row: Row) -> Example:
        messages = row.get(self.names["messages"])
        if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
            raise BadData(f"{row.place}: messages must be a list of {{role, content}} objects.")
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise BadData(
                f"{row.place}: the last message has role {messages[-1]['role']!r}; it must be an "
                "assistant's turn after another's, for that is what training teaches."
            )
        *before, last = messages
        prompt = chat_prompt(self.context.tokenizer, before, f"{row.place} (chat messages)")
        answer = row.values.get(self.names["answer"], last["content"])
        key = "\n".join(message["content"] for message in before)
        return Example(prompt, last["content"], str(answer), key)

    def _label_word(self, row: Row) -> str:
        label = row.get(self.names["label"])
        if self.labels is None:
            return row.text(self.names["label"])
        words = (
            {str(k): str(v) for k, v in self.labels.items()}
            if isinstance(self.labels, Mapping)
            else {str(i): str(word) for i, word in enumerate(self.labels)}
        )
        if str(label) not in words:
            raise BadData(
                f"{row.place}: label {label!r} has no word; labels known: {', '.join(words)}."
            )
        return words[str(label)]


def _check_options(source: str, fields: Mapping[str, str], match: str, holdout: float) -> None:
    if not source:
        raise BadRecipe("task 'custom' needs a path or hub id.", try_="custom:train.jsonl")
    for role in fields:
        if role not in ROLES:
            raise BadRecipe(
                f"fields names {role!r}{nearest(role, ROLES)}; allowed: {', '.join(ROLES)}."
            )
    if match not in MATCHES:
        raise BadRecipe(
            f"match is {match!r}{nearest(match, MATCHES)}; allowed: {', '.join(MATCHES)}."
        )
    if not 0 <= holdout < 1:
        raise BadRecipe(f"holdout is {holdout}; it must be at least 0 and below 1.")


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )


def _share(key: str) -> float:
    """Return a number in [0, 1) that depends on the question's text alone.

    Repeated questions fall on one side, and adding rows moves no other row.
    """
    digest = hashlib.sha256(json.dumps(normalise(key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
