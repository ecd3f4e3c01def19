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
from elastune.space import SearchSpace, SubnetConfig


@dataclass(frozen=True)
class Draw:
    """One sub-network to train in a step, and the weight of its loss."""

    config: SubnetConfig
    weight: float = 1.0


class Sampler(Protocol):
    """Chooses the sub-networks of a step; the training loop activates them one after another."""

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


class ProgressiveSampler:
    """Random sub-networks from a space that widens: first the largest choices, then smaller ones.

    Source: Cai et al. 2020 (once-for-all, progressive shrinking), as BootstrapNAS's width
    indicator: in stage k of n, each dim draws from its k largest choices. Stages are equally long.
    """

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self.space = space
        self.seed = seed
        self.n_stages = max(len(dim.choices) for dim in space.dims)

    def draw(self, index: int, progress: float) -> Sequence[Draw]:
        """Return one random configuration of the stage that ``progress`` is in."""
        rng = np.random.default_rng((self.seed, index))
        stage = min(int(progress * self.n_stages), self.n_stages - 1)
        indices = [int(rng.integers(min(stage + 1, len(d.choices)))) for d in self.space.dims]
        return [Draw(self.space.decode(indices))]


SAMPLERS: Mapping[str, type[RandomSampler] | type[SandwichSampler] | type[ProgressiveSampler]] = {
    "random": RandomSampler,
    "sandwich": SandwichSampler,
    "progressive": ProgressiveSampler,
}


def make_sampler(name: str, space: SearchSpace, seed: int) -> Sampler:
    """Build the sampler of that name.

    Raises:
        BadRecipe: no such sampler.
    """
    if name not in SAMPLERS:
        raise BadRecipe(f"unknown sampler {name!r}; known are {', '.join(SAMPLERS)}")
    return SAMPLERS[name](space, seed)
