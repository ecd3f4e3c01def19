"""Start and end of the answer in a context."""

from __future__ import annotations

from typing import Any

from elastune.heads.base import Head


class QuestionAnswering(Head):
    """To be written."""

    name = "question-answering"

    def encode(self, examples: Any, tokenizer: Any, max_length: int) -> list[Any]:
        raise NotImplementedError

    def length(self, item: Any) -> int:
        raise NotImplementedError

    def collate(self, items: Any) -> dict[str, Any]:
        raise NotImplementedError

    def loss(self, model: Any, batch: dict[str, Any]) -> Any:
        raise NotImplementedError

    def n_targets(self, batch: dict[str, Any]) -> Any:
        raise NotImplementedError
