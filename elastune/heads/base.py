"""What a kind of head reads and what its loss is: all that training needs to know of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastune.features import Features, Sequences
from elastune.tasks.base import AnyExample

Outputs = tuple[Any, ...]
"""What a model says at a batch's targets: tensors, or what stands for them (`LazyLogits`)."""


class SoftTargets(NamedTuple):
    """What a teacher says of a batch."""

    outputs: Outputs
    features: Features | None = None
    """Its hidden states and projections, where they are learnt from, too."""


class Head(ABC):
    """Examples -> items -> batches -> summed loss.

    Heads hold no weights: those are the model's. ``loss`` and ``outputs`` get the batch as
    ``collate`` made it, on the model's device.
    """

    name: str
    pads: bool = True
    """Whether batches are padded to their longest item, so that lengths should be alike."""
    cacheable: bool = True
    """Whether the outputs of an item are few enough numbers to be kept on disk (`to_rows`)."""

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

    def loss(self, model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
        """Return the loss summed over the batch's targets (see `n_targets`)."""
        return self.loss_of(self.outputs(model, batch), batch)

    @abstractmethod
    def outputs(self, model: PreTrainedModel, batch: dict[str, Any]) -> Outputs:
        """Run the model, and return what it says at the batch's targets and nowhere else."""

    @abstractmethod
    def loss_of(self, outputs: Outputs, batch: dict[str, Any]) -> Tensor:
        """Return `loss`, given what the model said."""

    @abstractmethod
    def distillation_loss(
        self, outputs: Outputs, teacher: Outputs, batch: dict[str, Any], temperature: float
    ) -> Tensor:
        """Return how far a student is from its teacher, summed over the targets as `loss` is.

        That is temperature^2 KL(teacher || student) with both softened by the temperature (Hinton
        et al. 2015, equations 1 and 4). The teacher gets no gradient.

        Args:
            outputs: of the student.
            teacher: another model's outputs for the same batch.
            temperature: above 0.

        Raises:
            BadRecipe: the two do not tell the same classes apart.
        """

    @abstractmethod
    def n_targets(self, batch: dict[str, Any]) -> Tensor:
        """Return how many targets the loss is summed over, a scalar tensor."""

    def to_rows(self, outputs: Outputs, batch: dict[str, Any]) -> list[Tensor]:
        """Return the outputs of each item of a batch, a flat tensor each, without padding.

        Only for heads that are `cacheable`.
        """
        raise NotImplementedError

    def from_rows(self, rows: Sequence[Tensor], batch: dict[str, Any]) -> Outputs:
        """Return the outputs for a batch, given `to_rows` of its items, on the batch's device."""
        raise NotImplementedError

    def sequences(self, batch: dict[str, Any]) -> Sequences:
        """Return where the sequences of a batch have tokens; each counts as one target."""
        mask = batch["attention_mask"].bool()
        return Sequences(mask, torch.ones(len(mask), device=mask.device))

    @contextmanager
    def training(self, model: PreTrainedModel) -> Iterator[None]:
        """Prepare ``model`` for batches of this head as long as the context lasts."""
        yield
