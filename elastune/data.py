"""Examples -> token ids -> leak-free splits and batches without padding.

Splits are made once, by seed, and checked: calibration, train, validation (search) and report
share no question. Calibration and training both come from the training side.

Shapes: `T` tokens of a packed batch, `S` sequences in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from elastune.errors import BadData
from elastune.leaks import (
    Policy,
    check_leaks,
    check_policy,
    normal_keys,
    refuse,
    training_leaks,
    warning,
)
from elastune.tasks.base import AnyExample, Example

IGNORED_LABEL = -100
"""Label of positions that carry no loss, as in torch's cross entropy and transformers."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt followed by its completion; the loss starts after ``n_prompt``."""

    input_ids: list[int]
    n_prompt: int


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Tokenise prompt, completion and the end-of-sequence token, cut at ``max_length`` tokens.

    The two parts are tokenised apart, so that the prompt's ids in training are exactly those that
    generation starts from.
    """
    prompt = tokenizer(example.prompt)["input_ids"]
    completion = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    ids = prompt + completion + [tokenizer.eos_token_id]
    return Encoded(ids[:max_length], min(len(prompt), max_length))


def encode_all(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Encoded]:
    """Tokenise examples, leaving out those whose completion does not fit in ``max_length``.

    Raises:
        BadData: nothing to train on is left.
    """
    if not examples:
        raise BadData("there are no examples to train on", try_="check the data file or its limit")
    encoded = [encode(example, tokenizer, max_length) for example in examples]
    kept = [item for item in encoded if item.n_prompt < len(item.input_ids)]
    if not kept:
        raise BadData(
            f"none of the {len(examples)} examples has a completion within {max_length} tokens",
            try_="raise train.max_length",
        )
    return kept


@dataclass(frozen=True)
class Splits:
    """Four sets of examples that share no question, except that calibration is part of train.

    ``notes`` tell the user of leaks that were dropped, or kept on demand.
    """

    calibration: list[Any] = field(repr=False)
    train: list[Any] = field(repr=False)
    validation: list[Any] = field(repr=False)
    report: dict[str, Sequence[Any]] = field(repr=False)
    notes: list[str] = field(default_factory=list)


def make_splits(
    training: Sequence[AnyExample],
    report: Mapping[str, Sequence[AnyExample]],
    *,
    n_train: int | None,
    n_validation: int,
    n_calibration: int,
    seed: int,
    leaks: Policy = "refuse",
) -> Splits:
    """Shuffle by ``seed`` and cut: first the validation set for the search, then the train set.

    Args:
        leaks: what becomes of training examples that a report set has, too (`elastune.leaks`):
            ``refuse`` them, ``drop`` them before the cut, or ``warn`` and keep them.

    Raises:
        BadData: too few examples, or a question occurs on both sides and ``leaks`` is ``refuse``.
        BadRecipe: ``leaks`` is none of the three.
    """
    check_policy(leaks)
    order = np.random.default_rng(seed).permutation(len(training))
    notes: list[str] = []
    if leaks == "drop":
        kept, notes = check_leaks(training, report, "drop")
        order = order[np.isin(order, kept)]
    needed = n_validation + max(n_train or 1, 1)
    if len(order) < needed:
        raise BadData(
            f"{len(order)} training examples cannot give {n_validation} for validation and "
            f"{n_train or 'at least 1'} for training",
            try_=f"lower data.n_train or data.n_validation (together at most {len(order)})",
        )
    shuffled = [training[i] for i in order]
    validation = shuffled[:n_validation]
    # A question asked twice in the training file must not stand on both sides of the cut.
    seen = set(normal_keys(validation))
    others = shuffled[n_validation:]
    rest = [e for e, key in zip(others, normal_keys(others), strict=True) if key not in seen]
    if len(rest) < (n_train or 1):
        raise BadData(
            f"{len(rest)} training examples ask what validation does not, and "
            f"{n_train or 'at least 1'} are needed: questions of the training file repeat",
            try_="lower data.n_train or data.n_validation, or drop the repeats",
        )
    train = rest[:n_train]
    if leaks != "drop":
        found = training_leaks({"train": train, "validation": validation}, report)
        if leaks == "refuse":
            refuse(found)
        notes = [warning(leak) for leak in found]
    return Splits(train[:n_calibration], train, validation, dict(report), notes)


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid end to end, no padding: every tensor has one row of `T` tokens.

    ``starts`` holds the `S` + 1 offsets at which sequences begin, ending with `T` (int32), the
    ``cu_seqlens`` of variable-length attention. ``positions`` restart at 0 with each sequence.
    ``labels`` are already shifted: ``labels[t]`` is what position ``t`` must predict.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    starts: Tensor

    @property
    def n_tokens(self) -> int:
        """Return `T`."""
        return self.input_ids.shape[1]


def pack(examples: Sequence[Encoded]) -> PackedBatch:
    """Lay tokenised examples end to end; labels are set on completions alone.

    Only what has a label somewhere after it is kept: a sequence's last token predicts nothing.
    """
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    starts = [0]
    for item in examples:
        tokens = item.input_ids
        ids += tokens[:-1]
        first = max(item.n_prompt - 1, 0)
        labels += [IGNORED_LABEL] * first + tokens[first + 1 :]
        positions += range(len(tokens) - 1)
        starts.append(len(ids))
    return PackedBatch(
        torch.tensor([ids]),
        torch.tensor([labels]),
        torch.tensor([positions]),
        torch.tensor(starts, dtype=torch.int32),
    )


def calibration_rows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_sequences: int,
    length: int,
    seed: int,
) -> Tensor:
    """Fill ``n_sequences`` rows of exactly ``length`` tokens from shuffled texts laid end to end.

    Returns:
        int64 token ids, shape ``(n_sequences, length)``; fewer rows when the text runs out.

    Raises:
        BadData: not even one row can be filled.
    """
    texts = list(texts)
    order = np.random.default_rng(seed).permutation(len(texts))
    needed = n_sequences * length
    ids: list[int] = []
    for i in order:
        if len(ids) >= needed:
            break
        ids += tokenizer(texts[i])["input_ids"]
    n_rows = min(n_sequences, len(ids) // length)
    if n_rows == 0:
        raise BadData(
            f"the calibration text has {len(ids)} tokens, less than one row of {length}",
            try_="lower sparsify.calibration.length or give more text",
        )
    return torch.tensor(ids[: n_rows * length]).view(n_rows, length)


def row_batches(rows: Tensor, tokens_per_batch: int) -> Iterator[Tensor]:
    """Cut ``(N, length)`` rows into batches of about ``tokens_per_batch`` tokens."""
    step = max(1, tokens_per_batch // rows.shape[1])
    yield from rows.split(step)
