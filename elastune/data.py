"""Examples -> token ids -> leak-free splits and batches without padding.

Splits are made once, by seed, and checked: calibration, train, validation (search) and report
share no question. Calibration and training both come from the training side.

Shapes: `T` tokens of a packed batch, `S` sequences in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from elastune.errors import BadData
from elastune.tasks.base import Example, normalise

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
    """Four sets of examples that share no question, except that calibration is part of train."""

    calibration: list[Example] = field(repr=False)
    train: list[Example] = field(repr=False)
    validation: list[Example] = field(repr=False)
    report: dict[str, list[Example]] = field(repr=False)


def make_splits(
    training: Sequence[Example],
    report: dict[str, list[Example]],
    *,
    n_train: int | None,
    n_validation: int,
    n_calibration: int,
    seed: int,
) -> Splits:
    """Shuffle by ``seed`` and cut: first the validation set for the search, then the train set.

    Raises:
        BadData: too few examples, or a question occurs on both sides (see `check_disjoint`).
    """
    order = np.random.default_rng(seed).permutation(len(training))
    needed = n_validation + max(n_train or 1, 1)
    if len(training) < needed:
        raise BadData(
            f"{len(training)} training examples cannot give {n_validation} for validation and "
            f"{n_train or 'at least 1'} for training",
            try_=f"lower data.n_train or data.n_validation (together at most {len(training)})",
        )
    shuffled = [training[i] for i in order]
    validation = shuffled[:n_validation]
    # A question asked twice in the training file must not stand on both sides of the cut.
    seen = {normalise(example.key) for example in validation}
    rest = [example for example in shuffled[n_validation:] if normalise(example.key) not in seen]
    if len(rest) < (n_train or 1):
        raise BadData(
            f"{len(rest)} training examples ask what validation does not, and "
            f"{n_train or 'at least 1'} are needed: questions of the training file repeat",
            try_="lower data.n_train or data.n_validation, or drop the repeats",
        )
    train = rest[:n_train]
    splits = Splits(train[:n_calibration], train, validation, report)
    check_disjoint({"train": train, "validation": validation, **prefixed(report)})
    return splits


def prefixed(report: dict[str, list[Example]]) -> dict[str, list[Example]]:
    """Name report sets ``report:<task>`` so that they cannot be taken for the training side."""
    return {f"report:{name}": examples for name, examples in report.items()}


def check_disjoint(splits: dict[str, list[Example]]) -> None:
    """Refuse questions (compared by normalised text) that occur in two splits.

    Report sets may overlap each other (MAWPS is the parent of three other sets).

    Raises:
        BadData: names the splits, the number of shared questions and one of them.
    """
    keys = {name: {normalise(e.key): e.key for e in examples} for name, examples in splits.items()}
    names = list(keys)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if first.startswith("report:") and second.startswith("report:"):
                continue
            shared = keys[first].keys() & keys[second].keys()
            if shared:
                sample = keys[first][min(shared)]
                raise BadData(
                    f"{len(shared)} question(s) occur in both {first} and {second}, "
                    f"for example {sample[:120]!r}",
                    try_="drop them from the training data; scores on seen questions mean nothing",
                )


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
