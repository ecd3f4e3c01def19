"""What a kind of head reads and what its loss is: all that training needs to know of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastune.tasks.base import AnyExample


class Head(ABC):
    """Examples -> items -> batches -> summed loss.

    Heads hold no weights: those are the model's. ``loss`` gets the batch as ``collate`` made it,
    on the model's device.
    """

    name: str
    pads: bool = True
    """Whether batches are padded to their longest item, so that lengths should be alike."""

    @abstractmethod
    def encode(
        self,
        examples: Sequence[AnyExample],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
    ) -> list[Any]:
        """Tokenise examples into items; one example may give several, or none that fits.

        Raises:
            BadData: nothing to train on is left.
        """

    @abstractmethod
    def length(self, item: Any) -> int:
        """Return the tokens of an item."""

    @abstractmethod
    def collate(self, items: Sequence[Any]) -> dict[str, Any]:
        """Return a batch; ``input_ids`` and ``labels`` are among its tensors."""

    @abstractmethod
    def loss(self, model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
        """Return the loss summed over the batch's targets (see `n_targets`)."""

    @abstractmethod
    def n_targets(self, batch: dict[str, Any]) -> Tensor:
        """Return how many targets the loss is summed over, a scalar tensor."""

    @contextmanager
    def training(self, model: PreTrainedModel) -> Iterator[None]:
        """Prepare ``model`` for batches of this head as long as the context lasts."""
        yield
