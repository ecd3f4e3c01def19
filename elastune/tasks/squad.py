"""SQuAD 1.1 and 2.0: the answer is a piece of a Wikipedia paragraph (Rajpurkar et al., 2016, 2018).

Reported on the official development split: the test split is not public.
"""

from __future__ import annotations

from typing import ClassVar

from elastune.errors import BadData
from elastune.tasks.base import QuestionAnsweringExample
from elastune.tasks.question_answering import QuestionAnsweringTask
from elastune.tasks.sources import Row, hub_rows, local_file, read_rows


class SQuAD(QuestionAnsweringTask):
    """SQuAD 1.1: every question has an answer in its paragraph."""

    name = "squad"
    hub: ClassVar[str] = "rajpurkar/squad"

    def train_examples(self) -> list[QuestionAnsweringExample]:
        return [self.from_row(row) for row in self._rows("train")]

    def report_examples(self) -> list[QuestionAnsweringExample]:
        return [self.from_row(row) for row in self._rows("validation")]

    def _rows(self, split: str) -> list[Row]:
        if self.context.data_dir is None:
            return hub_rows(self.hub, split=split)
        folder = self.context.data_dir / self.name
        path = local_file(folder, split)
        if path is None:
            raise BadData(
                f"task {self.name!r} finds no {split} split in {folder}.",
                try_=f"put {split}.jsonl.gz there; without data_dir it is read from the hub",
            )
        return read_rows(path)


class SQuADv2(SQuAD):
    """SQuAD 2.0: for about half of the questions the paragraph holds no answer."""

    name = "squad_v2"
    hub = "rajpurkar/squad_v2"
    has_unanswerable = True
