"""One label per text or pair of texts: classes (cross entropy) or a number (squared error)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastune.decoding import forward_parameters
from elastune.errors import BadData
from elastune.heads.base import Head, Outputs
from elastune.losses import distillation_loss
from elastune.tasks.base import ClassificationExample


@dataclass(frozen=True)
class EncodedText:
    """Token ids of a text or pair, with what else the model reads of it, and its label."""

    inputs: dict[str, list[int]]
    label: float
    pad_id: int

    @property
    def n_tokens(self) -> int:
        """Return the number of tokens."""
        return len(self.inputs["input_ids"])


class SequenceClassification(Head):
    """Padded batches; one target per example. Works for encoders and decoders alike."""

    name = "sequence-classification"

    def encode(
        self,
        examples: Sequence[Any],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
    ) -> list[EncodedText]:
        if not examples:
            raise BadData("there are no examples to train on", try_="check the data file")
        return encode_texts(examples, tokenizer, max_length)

    def length(self, item: EncodedText) -> int:
        return item.n_tokens

    def collate(self, items: Sequence[EncodedText]) -> dict[str, Any]:
        return {**padded(items), "labels": torch.tensor([item.label for item in items])}

    def outputs(self, model: PreTrainedModel, batch: dict[str, Any]) -> Outputs:
        # A teacher of another family may read less, such as no token_type_ids.
        accepted = forward_parameters(model) - {"labels"}
        inputs = {key: value for key, value in batch.items() if key in accepted}
        return (model(**inputs).logits.float(),)

    def loss_of(self, outputs: Outputs, batch: dict[str, Any]) -> Tensor:
        (logits,) = outputs
        if logits.shape[-1] == 1:
            return mse_loss(logits[:, 0], batch["labels"].float(), reduction="sum")
        return cross_entropy(logits, batch["labels"].long(), reduction="sum")

    def distillation_loss(
        self, outputs: Outputs, teacher: Outputs, batch: dict[str, Any], temperature: float
    ) -> Tensor:
        """Return the divergence of the classes, or the squared distance to the teacher's number."""
        (own,), (target,) = outputs, teacher
        if own.shape == target.shape and own.shape[-1] == 1:
            return mse_loss(own, target.detach(), reduction="sum")
        return distillation_loss(own, target, temperature)

    def n_targets(self, batch: dict[str, Any]) -> Tensor:
        return torch.tensor(len(batch["labels"]))

    def to_rows(self, outputs: Outputs, batch: dict[str, Any]) -> list[Tensor]:
        return list(outputs[0])

    def from_rows(self, rows: Sequence[Tensor], batch: dict[str, Any]) -> Outputs:
        return (torch.stack(list(rows)).to(batch["input_ids"].device),)


def encode_texts(
    examples: Sequence[ClassificationExample], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[EncodedText]:
    """Tokenise texts or pairs, cut at ``max_length`` tokens (the longer of a pair first)."""
    texts = [example.text for example in examples]
    pairs = [example.text_pair or "" for example in examples]
    has_pairs = any(example.text_pair is not None for example in examples)
    encoded = tokenizer(
        texts,
        pairs if has_pairs else None,
        truncation="longest_first" if has_pairs else True,
        max_length=max_length,
        return_attention_mask=False,
    )
    pad = int(tokenizer.pad_token_id)
    return [
        EncodedText({key: encoded[key][i] for key in encoded}, example.label, pad)
        for i, example in enumerate(examples)
    ]


def padded(items: Sequence[EncodedText]) -> dict[str, Tensor]:
    """Return a right-padded batch: every input (B, L) and its attention mask."""
    length = max(item.n_tokens for item in items)
    batch: dict[str, Tensor] = {}
    for key in items[0].inputs:
        fill = items[0].pad_id if key == "input_ids" else 0
        rows = [item.inputs[key] + [fill] * (length - item.n_tokens) for item in items]
        batch[key] = torch.tensor(rows)
    mask = [[1] * item.n_tokens + [0] * (length - item.n_tokens) for item in items]
    batch["attention_mask"] = torch.tensor(mask)
    return batch
