"""How the tickets of a search stand at one moment: what workers read before they act."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from elastune.search.base import Trial
from elastune.search.workers import Worker
from elastune.space import SubnetConfig


@dataclass(frozen=True)
class Ticket:
    """A trial of the study, whatever has become of it.

    Attributes:
        number: the study's; abandoned tickets have one, too.
        trial: None before it has a configuration. Its values are NaN while it is measured.
        running: somebody works on it.
        worker: who.
        beat: changes with every sign of life.
    """

    number: int
    trial: Trial | None
    running: bool
    worker: Worker | None = None
    beat: object = None


@dataclass(frozen=True)
class Board:
    """All tickets at one moment.

    Attributes:
        live: running or finished, in the order of their numbers.
        dropped: configurations of abandoned tickets, in this order.
        deadly: those among them whose worker died, once for each time.
        settled: so many live tickets from the first on have finished, whatever may come.
    """

    live: tuple[Ticket, ...]
    dropped: tuple[SubnetConfig, ...]
    deadly: tuple[SubnetConfig, ...] = ()
    settled: int = 0

    @cached_property
    def running(self) -> tuple[Ticket, ...]:
        """The tickets that somebody works on."""
        return tuple(ticket for ticket in self.live[self.settled :] if ticket.running)

    @cached_property
    def trials(self) -> tuple[Trial, ...]:
        """The live tickets that have a configuration."""
        return tuple([ticket.trial for ticket in self.live if ticket.trial is not None])

    @cached_property
    def orphans(self) -> tuple[SubnetConfig, ...]:
        """The configurations that nobody works on any more, and nobody has measured."""
        if not self.dropped:
            return ()
        taken = {trial.config for trial in self.trials}
        return tuple(config for config in dict.fromkeys(self.dropped) if config not in taken)

    def before(self, place: int) -> Board:
        """Return the board without the live tickets from a place on."""
        return Board(self.live[:place], self.dropped, self.deadly, min(self.settled, place))

    def place(self, worker: Worker) -> int | None:
        """Return how many live tickets stand before the one that a worker has open, if any."""
        places = range(self.settled, len(self.live))
        own = (p for p in places if self.live[p].running and self.live[p].worker == worker)
        return next(own, None)


@dataclass
class Rows:
    """The first tickets of a study, sorted for a `Board`; ``n`` with those that were abandoned."""

    live: list[Ticket] = field(default_factory=list)
    dropped: list[SubnetConfig] = field(default_factory=list)
    deadly: list[SubnetConfig] = field(default_factory=list)
    n: int = 0

    def copy(self) -> Rows:
        """Return the same tickets, to be gone on with."""
        return Rows(self.live.copy(), self.dropped.copy(), self.deadly.copy(), self.n)
