"""Next-token prediction: the loss of completions given their prompts, in packed batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastune.data import IGNORED_LABEL, Encoded, PackedBatch, encode_all, pack
from elastune.features import Sequences
from elastune.heads.base import Head, Outputs
from elastune.losses import (
    completion_logits,
    completion_loss,
    distillation_loss,
    labels_of,
    logits_loss,
)
from elastune.packing import packed_attention


class CausalLM(Head):
    """Sequences laid end to end without padding; targets are the completions' tokens."""

    name = "causal-lm"
    pads = False
    cacheable = False  # a vocabulary of numbers for every token

    def encode(
        self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> list[Encoded]:
        return encode_all(examples, tokenizer, max_length)

    def length(self, item: Encoded) -> int:
        return len(item.input_ids)

    def collate(self, items: Sequence[Encoded]) -> dict[str, Any]:
        batch = pack(items)
        return {
            "input_ids": batch.input_ids,
            "labels": batch.labels,
            "positions": batch.positions,
            "starts": batch.starts,
        }

    def loss(self, model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
        return completion_loss(model, _packed(batch))[0]

    def outputs(self, model: PreTrainedModel, batch: dict[str, Any]) -> Outputs:
        return (completion_logits(model, _packed(batch)),)

    def loss_of(self, outputs: Outputs, batch: dict[str, Any]) -> Tensor:
        return logits_loss(outputs[0], labels_of(_packed(batch)))

    def distillation_loss(
        self, outputs: Outputs, teacher: Outputs, batch: dict[str, Any], temperature: float
    ) -> Tensor:
        return distillation_loss(outputs[0], teacher[0], temperature)

    def n_targets(self, batch: dict[str, Any]) -> Tensor:
        return (batch["labels"] != IGNORED_LABEL).sum()

    def sequences(self, batch: dict[str, Any]) -> Sequences:
        """Return the packed sequences one below the other; each counts as its labelled tokens."""
        labelled = batch["labels"][0] != IGNORED_LABEL
        starts = batch["starts"].to(labelled.device).long()
        lengths = starts.diff()
        mask = torch.arange(int(lengths.max()), device=labelled.device) < lengths[:, None]
        # Differences of a running count: a sequence may have no tokens.
        count = torch.nn.functional.pad(labelled.cumsum(0), (1, 0))
        return Sequences(mask, count[starts[1:]] - count[starts[:-1]])

    @contextmanager
    def training(self, model: PreTrainedModel) -> Iterator[None]:
        with packed_attention(model):
            yield


def _packed(batch: dict[str, Any]) -> PackedBatch:
    return PackedBatch(batch["input_ids"], batch["labels"], batch["positions"], batch["starts"])
