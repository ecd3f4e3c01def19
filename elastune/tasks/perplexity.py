"""Perplexity on running text: WikiText-2, or any text file."""

from __future__ import annotations

from pathlib import Path

from elastune.errors import BadData, BadRecipe
from elastune.metrics import PERPLEXITY
from elastune.tasks.base import Example, Kind, Task, TaskContext
from elastune.tasks.sources import JSON_SUFFIXES, hub_rows, read_rows, read_text

PIECE_CHARS = 2000
"""Text is cut at line ends into pieces of at least this length: about one window of tokens."""


class Perplexity(Task):
    """exp(mean negative log-likelihood) over non-overlapping windows of the whole text.

    The argument is ``wikitext2`` or a path (.txt, or .jsonl/.json with a field ``text``; .gz too).

    Args:
        window: tokens in a window; the first of each is not predicted.
        train: path of a text to train on (a path argument has no training split of its own).
    """

    name = "perplexity"
    metrics = (PERPLEXITY,)
    kind: Kind = "perplexity"
    default_template = "none"

    def __init__(
        self, context: TaskContext, *, window: int = 512, train: str | None = None
    ) -> None:
        super().__init__(context)
        if window < 2:
            raise BadRecipe(f"window is {window}; it must be at least 2 tokens.")
        self.window = window
        self.train = train
        self.source = context.argument or "wikitext2"
        is_file = self.source != "wikitext2"
        self.name = f"perplexity:{Path(self.source).name}" if is_file else "wikitext2"

    def train_examples(self) -> list[Example]:
        if self.train is not None:
            return self._from_path(Path(self.train))
        if self.source == "wikitext2":
            return self._wikitext2("train")
        raise self.lacks("training", "name a text to train on with the option `train`")

    def report_examples(self) -> list[Example]:
        if self.source == "wikitext2":
            return self._wikitext2("test")
        return self._from_path(Path(self.source))

    def is_finished(self, text: str) -> bool:
        return False

    def _wikitext2(self, split: str) -> list[Example]:
        if self.context.data_dir is None:
            rows = hub_rows("Salesforce/wikitext", subset="wikitext-2-raw-v1", split=split)
            return _pieces("".join(row.text("text") for row in rows))
        name = {"train": "train_head", "test": "test"}[split]
        return self._from_path(self.context.data_dir / "wikitext2" / f"{name}.txt.gz")

    def _from_path(self, path: Path) -> list[Example]:
        if path.name.endswith(JSON_SUFFIXES):
            return [_piece(row.text("text") + "\n\n") for row in read_rows(path)]
        text = read_text(path)
        if not text.strip():
            raise BadData(f"{path} holds no text.", try_="a file with text")
        return _pieces(text)


def _piece(text: str) -> Example:
    return Example(prompt="", completion=text, answer="", key=text)


def _pieces(text: str) -> list[Example]:
    """Cut ``text`` at line ends; joined again the pieces are the text."""
    pieces: list[Example] = []
    lines: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= PIECE_CHARS:
            pieces.append(_piece("".join(lines)))
            lines, length = [], 0
    return pieces + ([_piece("".join(lines))] if lines else [])
