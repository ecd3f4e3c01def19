"""Which sub-networks a training step trains.

Every draw depends on (seed, index) alone, never on what was drawn before: resuming, gradient
checkpointing and every process of a distributed run then agree without any saved state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from elastune.errors import BadRecipe
from elastune.space import DimKind, SearchSpace, SubnetConfig


@dataclass(frozen=True)
class Draw:
    """One sub-network to train in a step, and the weight of its loss."""

    config: SubnetConfig
    weight: float = 1.0


class Sampler(Protocol):
    """Chooses the sub-networks of a step; the training loop activates them one after another.

    A sampler every step of which begins with the largest sub-network says so by an attribute
    ``begins_with_largest = True``: only then can the others learn from it.
    """

    def draw(self, index: int, progress: float) -> Sequence[Draw]:
        """Return the draws of step ``index``; ``progress`` runs from 0 to 1 over the training."""


class FixedSampler:
    """The one network there is, every step: plain training."""

    def draw(self, index: int, progress: float) -> Sequence[Draw]:
        """Return the empty configuration."""
        return [Draw(SubnetConfig({}))]


class RandomSampler:
    """One uniformly random sub-network a step (BootstrapNAS, LoNAS, Shears)."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self.space = space
        self.seed = seed

    def draw(self, index: int, progress: float) -> Sequence[Draw]:
        """Return one random configuration."""
        return [Draw(self.space.sample(np.random.default_rng((self.seed, index))))]


class SandwichSampler:
    """The largest, the smallest and ``n_random`` random sub-networks, equally weighted.

    Source: Yu and Huang 2019 (universally slimmable networks), as in EFTNAS with one random
    sub-network. A step costs ``n_random + 2`` plain ones. The weights add up to 1, so that
    learning rate and gradient clipping mean the same as for other samplers.
    """

    begins_with_largest = True

    def __init__(self, space: SearchSpace, seed: int, n_random: int = 1) -> None:
        self.space = space
        self.seed = seed
        self.n_random = n_random

    def draw(self, index: int, progress: float) -> Sequence[Draw]:
        """Return largest, random ones, smallest."""
        rng = np.random.default_rng((self.seed, index))
        configs = [self.space.largest()]
        configs += [self.space.sample(rng) for _ in range(self.n_random)]
        configs.append(self.space.smallest())
        return [Draw(config, 1 / len(configs)) for config in configs]


STAGE_ORDER: tuple[tuple[DimKind, ...], ...] = (
    ("rank",),
    ("heads", "ffn", "embedding", "density"),
    ("depth",),
)
"""Kinds of dim in the order in which progressive training opens them; a tuple opens as one."""


class ProgressiveSampler:
    """Random sub-networks from a space that widens: first the largest choices, then smaller ones.

    Source: Cai et al. 2020 (once-for-all, progressive shrinking), as BootstrapNAS's width
    indicator. Stage 0 trains the largest sub-network alone. Each stage that follows lets the dims
    of one group of kinds draw from one more of their largest choices, until that group is wholly
    open and the next one has its turn: ranks, then widths, then depth. Stages are equally long; a
    group that the space lacks, or that has no choice, takes no stage.
    """

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self.space = space
        self.seed = seed
        group_of = {kind: i for i, kinds in enumerate(STAGE_ORDER) for kind in kinds}
        groups = [group_of[dim.kind] for dim in space.dims]
        self.n_stages = 1
        first: dict[int, int] = {}
        for group in sorted(set(groups)):
            first[group] = self.n_stages
            members = zip(groups, space.dims, strict=True)
            self.n_stages += max(len(dim.choices) for own, dim in members if own == group) - 1
        self._first_stage = [first[group] for group in groups]

    def draw(self, index: int, progress: float) -> Sequence[Draw]:
        """Return one random configuration of the stage that ``progress`` is in."""
        rng = np.random.default_rng((self.seed, index))
        stage = min(int(progress * self.n_stages), self.n_stages - 1)
        opened = [
            min(max(stage - first + 2, 1), len(dim.choices))
            for first, dim in zip(self._first_stage, self.space.dims, strict=True)
        ]
        return [Draw(self.space.decode([int(rng.integers(n)) for n in opened]))]


SAMPLERS: Mapping[str, type[RandomSampler] | type[SandwichSampler] | type[ProgressiveSampler]] = {
    "random": RandomSampler,
    "sandwich": SandwichSampler,
    "progressive": ProgressiveSampler,
}


def make_sampler(name: str, space: SearchSpace, seed: int, n_random: int = 1) -> Sampler:
    """Build the sampler of that name.

    Args:
        n_random: random sub-networks in a step of the sandwich; others ignore it.

    Raises:
        BadRecipe: no such sampler.
    """
    if name not in SAMPLERS:
        raise BadRecipe(f"unknown sampler {name!r}; known are {', '.join(SAMPLERS)}")
    if name == "sandwich":
        return SandwichSampler(space, seed, n_random)
    return SAMPLERS[name](space, seed)
