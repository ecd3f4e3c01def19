"""Order of padded batches in training: random, but alike in length within a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class LengthGroups(Sampler[int]):
    """Indices whose every ``batch_size`` are of similar length, in another order each epoch.

    The order depends on (seed, epoch) alone, so that a resumed training goes on in it. Batches
    themselves are shuffled: transformers' own sampler lays them from long to short, over and over.

    Args:
        lengths: tokens of each item.
        batch_size: items in a batch.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; called by accelerate."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        grouped = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        full = len(grouped) // self.batch_size * self.batch_size
        batches = torch.tensor(grouped[:full], dtype=torch.long).view(-1, self.batch_size)
        order = torch.randperm(len(batches), generator=generator)
        yield from batches[order].flatten().tolist()
        yield from grouped[full:]
