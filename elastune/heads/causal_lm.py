"""Next-token prediction: the loss of completions given their prompts, in packed batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastune.data import IGNORED_LABEL, Encoded, PackedBatch, encode_all, pack
from elastune.heads.base import Head
from elastune.losses import completion_loss
from elastune.packing import packed_attention


class CausalLM(Head):
    """Sequences laid end to end without padding; targets are the completions' tokens."""

    name = "causal-lm"
    pads = False

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
        packed = PackedBatch(
            batch["input_ids"], batch["labels"], batch["positions"], batch["starts"]
        )
        return completion_loss(model, packed)[0]

    def n_targets(self, batch: dict[str, Any]) -> Tensor:
        return (batch["labels"] != IGNORED_LABEL).sum()

    @contextmanager
    def training(self, model: PreTrainedModel) -> Iterator[None]:
        with packed_attention(model):
            yield
