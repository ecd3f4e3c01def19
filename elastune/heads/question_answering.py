"""Start and end of the answer in a context, read through windows that overlap.

Shapes: `B` windows, `L` tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastune.decoding import forward_parameters
from elastune.errors import BadData, BadRecipe
from elastune.heads.base import Head, Outputs
from elastune.losses import distillation_loss
from elastune.tasks.base import QuestionAnsweringExample

STRIDE = 128
"""Tokens that neighbouring windows of a training context share (Devlin et al., 2019)."""
MIN_LENGTH = 32
"""The shortest window in which a question and a stretch of context still have room."""
_CHUNK = 512
"""Examples tokenised at once: bounds the memory of the tokenizer's own lists."""
_NO_OFFSETS = np.empty((0, 2), dtype=np.int32)


@dataclass(frozen=True, eq=False)
class Window:
    """A question with a stretch of its context, as token ids.

    Attributes:
        example: index of the example among those given.
        inputs: ``input_ids`` and, where the tokenizer makes them, ``token_type_ids``; each (L,).
        offsets: int32 (L, 2): first character in the context and the one after the last, of each
            token; (-1, -1) for tokens that are not of the context. Empty in training.
        start: token of the answer's start; 0 where the window does not hold the whole answer.
        end: token of the answer's end, inclusive; 0 likewise.
        pad_id: what fills ``input_ids`` in a batch.
    """

    example: int
    inputs: dict[str, np.ndarray]
    offsets: np.ndarray
    start: int
    end: int
    pad_id: int

    @property
    def n_tokens(self) -> int:
        """Return the number of tokens."""
        return len(self.inputs["input_ids"])


class QuestionAnswering(Head):
    """Padded batches of windows; one target (a start and an end) per window.

    A window that lacks the answer points at its first token ([CLS] where there is one). Works for
    encoders and decoders alike.
    """

    name = "question-answering"

    def encode(
        self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> list[Window]:
        if not examples:
            raise BadData("there are no examples to train on", try_="check the data file")
        found = windows(examples, tokenizer, max_length, STRIDE)
        return [replace(window, offsets=_NO_OFFSETS) for window in found]

    def length(self, item: Window) -> int:
        return item.n_tokens

    def collate(self, items: Sequence[Window]) -> dict[str, Any]:
        labels = torch.tensor([[item.start, item.end] for item in items])
        return {**padded(items), "labels": labels}

    def outputs(self, model: PreTrainedModel, batch: dict[str, Any]) -> Outputs:
        return span_logits(model, batch)

    def loss_of(self, outputs: Outputs, batch: dict[str, Any]) -> Tensor:
        start, end = outputs
        labels = batch["labels"]
        total = cross_entropy(start, labels[:, 0], reduction="sum")
        return (total + cross_entropy(end, labels[:, 1], reduction="sum")) / 2

    def distillation_loss(
        self, outputs: Outputs, teacher: Outputs, batch: dict[str, Any], temperature: float
    ) -> Tensor:
        pairs = zip(outputs, teacher, strict=True)
        start, end = (distillation_loss(own, target, temperature) for own, target in pairs)
        return (start + end) / 2

    def n_targets(self, batch: dict[str, Any]) -> Tensor:
        return torch.tensor(len(batch["labels"]))

    def to_rows(self, outputs: Outputs, batch: dict[str, Any]) -> list[Tensor]:
        """Return of each window its start logits and then its end logits."""
        start, end = outputs
        kept = batch["attention_mask"].bool()
        pairs = zip(start, end, kept, strict=True)
        return [torch.cat([s[tokens], e[tokens]]) for s, e, tokens in pairs]

    def from_rows(self, rows: Sequence[Tensor], batch: dict[str, Any]) -> Outputs:
        ids = batch["input_ids"]
        padded_logits = torch.full((2, *ids.shape), -torch.inf)
        for i, row in enumerate(rows):
            padded_logits[:, i, : len(row) // 2] = row.view(2, -1)
        start, end = padded_logits.to(ids.device)
        return start, end


def span_logits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return start and end logits, float32 (B, L) each; minus infinity at padding.

    Without that the loss of a window would depend on the windows it shares a batch with.
    """
    accepted = forward_parameters(model)
    output = model(**{key: value for key, value in batch.items() if key in accepted - {"labels"}})
    padding = batch["attention_mask"] == 0
    start, end = output.start_logits.float(), output.end_logits.float()
    return start.masked_fill(padding, -torch.inf), end.masked_fill(padding, -torch.inf)


def padded(items: Sequence[Window]) -> dict[str, Tensor]:
    """Return a right-padded batch: every input (B, L) and its attention mask."""
    lengths = torch.tensor([item.n_tokens for item in items])
    shape = (len(items), int(lengths.max()))
    batch: dict[str, Tensor] = {}
    for key in items[0].inputs:
        rows = np.full(shape, items[0].pad_id if key == "input_ids" else 0, dtype=np.int64)
        for row, item in zip(rows, items, strict=True):
            row[: item.n_tokens] = item.inputs[key]
        batch[key] = torch.from_numpy(rows)
    batch["attention_mask"] = (torch.arange(shape[1]) < lengths[:, None]).long()
    return batch


def windows(
    examples: Sequence[QuestionAnsweringExample],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
) -> list[Window]:
    """Tokenise question and context into windows of at most ``max_length`` tokens.

    Each holds the question (its first ``max_length // 2`` tokens) and a stretch of the context that
    shares ``stride`` tokens with the next, or a third of ``max_length`` if that is less. Windows
    stand in the order of the examples and, within one, of the context.

    Raises:
        BadRecipe: a tokenizer that cannot tell characters from tokens, or windows too short.
    """
    if not tokenizer.is_fast:
        raise BadRecipe(
            f"question answering needs to know which characters each token stands for, and "
            f"{type(tokenizer).__name__} does not tell",
            try_="a checkpoint with a fast tokenizer (tokenizer.json)",
        )
    max_length = min(max_length, tokenizer.model_max_length)
    if max_length < MIN_LENGTH or stride < 0:
        raise BadRecipe(
            f"max_length {max_length} and stride {stride}: windows of question and context need "
            f"at least {MIN_LENGTH} tokens, and a stride of at least 0",
            try_="max_length: 384 and stride: 128, as is common",
        )
    found: list[Window] = []
    for first in range(0, len(examples), _CHUNK):
        chunk = examples[first : first + _CHUNK]
        encoded = _encode(chunk, tokenizer, max_length, min(stride, max_length // 3))
        found += _windows(chunk, encoded, first, int(tokenizer.pad_token_id))
    return found


def _encode(
    examples: Sequence[QuestionAnsweringExample],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
) -> Any:
    # Decoders' tokenizers often put nothing between the two texts.
    extra = tokenizer.num_special_tokens_to_add(pair=True)
    gap = "" if extra > tokenizer.num_special_tokens_to_add(pair=False) else "\n"
    return tokenizer(
        [_shortened(e.question.strip(), tokenizer, max_length // 2 - 1) + gap for e in examples],
        [example.context for example in examples],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )


def _shortened(question: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> str:
    """Return as much of a question as ``limit`` tokens hold."""
    if len(question.encode()) <= limit:  # no token is less than a byte
        return question
    encoded = tokenizer(
        question, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    offsets = encoded["offset_mapping"]
    return question if len(offsets) <= limit else question[: offsets[limit - 1][1]]


def _windows(
    examples: Sequence[QuestionAnsweringExample], encoded: Any, first: int, pad_id: int
) -> Iterator[Window]:
    """Cut a tokenizer's output into windows; ``first`` is the index of the first example."""
    of_example = encoded["overflow_to_sample_mapping"]
    keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
    for i, rows in groupby(range(len(of_example)), key=of_example.__getitem__):
        parts = [(row, _context_offsets(encoded, row)) for row in rows]
        parts.sort(key=lambda part: int(part[1].max(initial=0)))
        for row, offsets in parts:
            # Characters that no token stands for are covered by the outermost windows.
            bounds = (
                0 if row == parts[0][0] else _first_character(offsets),
                len(examples[i].context) if row == parts[-1][0] else int(offsets[:, 1].max()),
            )
            start, end = _label(examples[i], offsets, bounds)
            inputs = {key: np.array(encoded[key][row], dtype=np.int32) for key in keys}
            yield Window(first + i, inputs, offsets, start, end, pad_id)


def _context_offsets(encoded: Any, row: int) -> np.ndarray:
    offsets = np.array(encoded["offset_mapping"][row], dtype=np.int32).reshape(-1, 2)
    of_text = encoded.encodings[row].sequence_ids
    offsets[np.array([text != 1 for text in of_text])] = -1
    return offsets


def _first_character(offsets: np.ndarray) -> int:
    return int(offsets[offsets[:, 0] >= 0, 0].min(initial=np.iinfo(np.int32).max))


def _label(
    example: QuestionAnsweringExample, offsets: np.ndarray, bounds: tuple[int, int]
) -> tuple[int, int]:
    """Return the first and last token of the answer, or (0, 0) if it is not all within bounds."""
    if not example.answers:
        return 0, 0
    text = example.answers[0]
    first = example.answer_start[0] + len(text) - len(text.lstrip())
    last = first + len(text.strip())
    if first < bounds[0] or last > bounds[1]:
        return 0, 0
    inside = np.flatnonzero((offsets[:, 0] < last) & (offsets[:, 1] > first))
    return (int(inside[0]), int(inside[-1])) if len(inside) else (0, 0)
