"""How much of an adapter each rank carries, and the ranks that keep a given part of it.

The energy of a module's first n ranks is the sum of their squared singular values: the squared
Frobenius norm of what they add to the weight or, ordered by outputs, the mean squared length of
what they add to the output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from elastune.errors import BadRecipe
from elastune.report.quantities import DASH

SHARES = (0.99, 0.95, 0.9, 0.8, 0.5)
"""Parts of the energy of which the ranks are usually asked for."""


@dataclass(frozen=True)
class ModuleEnergies:
    """The ranks of one module.

    Attributes:
        dim: its name in the space.
        module: its name in the model.
        stored_rank: the rank it was saved with.
        values: singular values of s B A, largest first; fewer than ``stored_rank`` where the
            product has a lower rank.
        features: in and out features together: the weights that one rank costs.
    """

    dim: str
    module: str
    stored_rank: int
    values: tuple[float, ...]
    features: int

    @property
    def rank(self) -> int:
        """The least rank that computes what was saved."""
        return len(self.values)

    @cached_property
    def _below(self) -> np.ndarray:
        """Energy of the first n ranks, n from 0."""
        return np.concatenate([[0.0], np.cumsum(np.square(self.values))])

    @property
    def energy(self) -> float:
        """Of all ranks."""
        return float(self._below[-1])

    def kept(self, rank: int) -> float:
        """Return the part of the energy in the first ``rank`` ranks, 0..1."""
        return float(self._below[min(rank, self.rank)] / self._below[-1])

    def rank_for(self, share: float) -> int:
        """Return the least rank that keeps this part of the energy."""
        # Shares of 1 must not fall to what a sum in another order rounds to.
        return int(np.searchsorted(self._below, share * self._below[-1] * (1 - 1e-12)))


@dataclass(frozen=True)
class AdapterEnergies:
    """The ranks of all modules of an adapter.

    Attributes:
        modules: those that add something.
        empty: names of modules whose B A is zero; they need no rank at all.
        by_outputs: energies are of outputs on calibration inputs, not of weights.
        n_stored: weights of the factors as they were saved.
    """

    modules: tuple[ModuleEnergies, ...]
    empty: tuple[str, ...] = ()
    by_outputs: bool = False
    n_stored: int = 0

    def n_params(self, ranks: Mapping[str, int]) -> int:
        """Return the weights of an adapter of these ranks.

        Args:
            ranks: dim -> rank, such as a configuration of the space.
        """
        return sum(m.features * ranks[m.dim] for m in self.modules)

    def kept(self, ranks: Mapping[str, int]) -> float:
        """Return the part of the whole adapter's energy that these ranks keep, 0..1."""
        kept = sum(m.energy * m.kept(ranks[m.dim]) for m in self.modules)
        return kept / sum(m.energy for m in self.modules)

    def largest(self) -> dict[str, int]:
        """Return the ranks that compute what was saved."""
        return {m.dim: m.rank for m in self.modules}

    def at_most(self, rank: int) -> dict[str, int]:
        """Return ranks cut to one size.

        Raises:
            BadRecipe: below 1.
        """
        if rank < 1:
            raise BadRecipe(f"the rank must be at least 1, got {rank}")
        return {m.dim: min(rank, m.rank) for m in self.modules}

    def for_energy(self, share: float) -> dict[str, int]:
        """Return the least rank of each module that keeps this part of its own energy.

        Raises:
            BadRecipe: not above 0 and at most 1.
        """
        check_shares([share])
        return {m.dim: m.rank_for(share) for m in self.modules}

    def within(self, n_params: float) -> dict[str, int]:
        """Return the ranks of at most so many weights that keep the most energy.

        Ranks are taken by energy per weight, over all modules alike, as long as they fit; a module
        may end with rank 0.

        Raises:
            BadRecipe: not even one rank fits.
        """
        ranks = {m.dim: 0 for m in self.modules}
        # Within a module the energy falls from rank to rank, so ranks come in their order.
        offers = sorted(
            (-(value**2) / m.features, position, index, m)
            for position, m in enumerate(self.modules)
            for index, value in enumerate(m.values)
        )
        left, full = n_params, set()
        for _, _, _, m in offers:
            if m.dim in full:
                continue
            if m.features > left:
                full.add(m.dim)  # later ranks of it mean nothing without this one
                continue
            ranks[m.dim] += 1
            left -= m.features
        if not any(ranks.values()):
            least = min(m.features for m in self.modules)
            raise BadRecipe(
                f"no rank fits in {n_params:,.0f} weights; the smallest costs {least:,}",
                try_="a larger target",
            )
        return ranks

    def table(
        self,
        shares: Sequence[float] = SHARES,
        *,
        whole: bool = False,
        chosen: Mapping[str, int] | None = None,
    ) -> Table:
        """Make a terminal table: the ranks that keep parts of each module's energy.

        Args:
            shares: parts of the energy.
            whole: a row a module; else a row for those of the same name in all blocks.
            chosen: dim -> rank, for a column more.
        """
        of = "outputs" if self.by_outputs else "weights"
        table = Table(title=f"ranks that keep a part of the energy of {of}", box=SIMPLE_HEAD)
        table.add_column("module", no_wrap=True)
        for header in ("weights", "saved", "full"):
            table.add_column(header, justify="right")
        for share in shares:
            table.add_column(f"{100 * share:g} %", justify="right")
        if chosen is not None:
            table.add_column("chosen", justify="right")
        groups: dict[str, list[ModuleEnergies]] = {}
        for m in self.modules:
            name = m.dim if whole or not m.dim.startswith("layers.") else m.dim.split(".", 2)[2]
            groups.setdefault(name, []).append(m)
        for name, members in groups.items():
            table.add_row(
                Text(name if len(members) == 1 else f"{name} ({len(members)})"),
                f"{sum(m.features * m.stored_rank for m in members):,}",
                _span(m.stored_rank for m in members),
                _span(m.rank for m in members),
                *(_span(m.rank_for(share) for m in members) for share in shares),
                *([_span(chosen[m.dim] for m in members)] if chosen is not None else []),
            )
        return table


def check_shares(shares: Iterable[float]) -> None:
    """Raise for parts of an energy that are none.

    Raises:
        BadRecipe: not above 0 and at most 1.
    """
    for share in shares:
        if not 0 < share <= 1:
            raise BadRecipe(
                f"a part of the energy is above 0 and at most 1, got {share:g}",
                try_=f"{share / 100:g}" if 1 < share <= 100 else "0.9",
            )


def _span(ranks: Iterable[int]) -> str:
    found = sorted(ranks)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]}{DASH}{found[-1]}"
