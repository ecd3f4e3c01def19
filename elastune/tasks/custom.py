"""A user's own data: prompt/completion, chat or labelled texts, in a file or on the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from elastune.errors import BadData, BadRecipe, nearest
from elastune.tasks.answers import CHOICE, NUMBER, Judge
from elastune.tasks.base import Example, Task, TaskContext
from elastune.tasks.prompts import chat_prompt
from elastune.tasks.sources import Row
from elastune.tasks.user_data import UserData

ROLES = ("prompt", "completion", "answer", "messages", "text", "label")
SHARE_GPT = "conversations"
"""Name of the messages in ShareGPT's format, whose turns have ``from`` and ``value``."""
_SPEAKERS = {"human": "user", "gpt": "assistant"}
MATCHES: dict[str, Judge | None] = {"exact": None, "number": NUMBER, "choice": CHOICE}


class Custom(Task):
    """Rows of a file (``custom:PATH``: jsonl, json, csv, tsv, parquet) or of ``custom:hub:ID``.

    A row is one of: ``prompt`` + ``completion`` (and ``answer`` where the gold answer differs);
    ``messages`` (or ShareGPT's ``conversations``), whose last assistant turn is the completion;
    ``text`` + ``label``. A prompt and completion may be messages, too: with the former, these are
    the formats of TRL's SFTTrainer.

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
        self.data = UserData(
            "custom",
            context,
            ROLES,
            self._from_row,
            fields=fields,
            report=report,
            holdout=holdout,
            split=split,
            subset=subset,
        )
        if match not in MATCHES:
            raise BadRecipe(
                f"match is {match!r}{nearest(match, MATCHES)}; allowed: {', '.join(MATCHES)}."
            )
        self.name, self.names = self.data.name, self.data.names
        self.labels = labels
        self.judge = MATCHES[match]

    def train_examples(self) -> list[Example]:
        return self.data.train()

    def report_examples(self) -> list[Example]:
        return self.data.report()

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
    def _multiline(self) -> bool:
        return any("\n" in example.answer.strip() for example in self.data.all)

    def _from_row(self, row: Row) -> Example:
        if self.names["messages"] in row.values:
            return self._from_turns(row, _messages(row, self.names["messages"]))
        if SHARE_GPT in row.values:
            return self._from_turns(row, _messages(row, SHARE_GPT))
        if self.names["text"] in row.values and self.names["prompt"] not in row.values:
            word = self._label_word(row)
            return self.example(row.text(self.names["text"]), word, word)
        if isinstance(row.values.get(self.names["prompt"]), list):
            before = _messages(row, self.names["prompt"])
            return self._from_turns(row, [*before, *_messages(row, self.names["completion"])])
        prompt = row.text(self.names["prompt"])
        completion = row.text(self.names["completion"])
        answer = self.names["answer"]
        return self.example(
            prompt, completion, row.text(answer) if answer in row.values else completion
        )

    def _from_turns(self, row: Row, messages: list[dict[str, str]]) -> Example:
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
        if self.names["label"] not in row.values:
            raise BadData(
                f"{row.place}: {self.names['text']!r} without {self.names['label']!r}: "
                "running text has no answer to judge",
                try_="task perplexity:TEST_FILE with the option train: TRAINING_FILE",
            )
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


def _messages(row: Row, name: str) -> list[dict[str, str]]:
    given = row.get(name)
    messages = [_message(each) for each in given] if isinstance(given, list) else []
    found = [message for message in messages if message is not None]
    if not found or len(found) < len(messages):
        raise BadData(
            f"{row.place}: {name} must be a list of {{role, content}} objects, contents as text.",
            try_="leave out rows with images, tools or tool calls: they are not read",
        )
    return found


def _message(given: Any) -> dict[str, str] | None:
    """Return a turn as role and content; None for what is no text of anyone."""
    if not isinstance(given, dict):
        return None
    role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    if isinstance(content, list):  # parts, as processors of several modalities have them
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "".join(map(str, parts)) if parts and None not in parts else None
    if isinstance(role, str) and isinstance(content, str):
        return {"role": _SPEAKERS.get(role, role), "content": content}
    return None
