"""GSM8K: grade-school maths word problems (Cobbe et al., 2021, arXiv 2110.14168)."""

from __future__ import annotations

import re

from elastune.errors import BadData
from elastune.tasks.base import Example
from elastune.tasks.maths import MathTask
from elastune.tasks.sources import Row, hub_rows, read_rows

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


class GSM8K(MathTask):
    """The official split: 7,473 training problems with rationales, 1,319 test problems."""

    name = "gsm8k"

    def train_examples(self) -> list[Example]:
        return [self._from_row(row) for row in self._rows("train")]

    def report_examples(self) -> list[Example]:
        return [self._from_row(row) for row in self._rows("test")]

    def _rows(self, split: str) -> list[Row]:
        path = self.local("gsm8k", f"{split}.jsonl.gz")
        if path is None:
            return hub_rows("openai/gsm8k", subset="main", split=split)
        return read_rows(path)

    def _from_row(self, row: Row) -> Example:
        rationale, mark, answer = row.text("answer").rpartition("####")
        if not mark:
            raise BadData(
                f"{row.place}: the answer lacks its last line '#### <number>'.",
                try_="end the answer with a line such as '#### 42'",
            )
        answer = answer.strip()
        steps = _CALCULATOR_MARK.sub("", rationale).strip()
        return self.example(
            row.text("question").strip(), f"{steps}\nThe answer is {answer}.", answer
        )
