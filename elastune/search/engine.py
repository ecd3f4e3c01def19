"""The search itself: workers that propose, measure and remember, until there are enough trials."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from elastune.errors import BadArtifact, BadRecipe, nearest
from elastune.search.base import (
    Known,
    Measurement,
    Objective,
    Propose,
    RacingObjective,
    SearchResult,
    Trial,
)
from elastune.search.history import History
from elastune.space import SearchSpace, SubnetConfig

if TYPE_CHECKING:
    from elastune.search.board import Board
    from elastune.search.store import TrialStore
    from elastune.search.workers import Worker

_LOG = logging.getLogger(__name__)
_SHORTEST, _LONGEST = 0.01, 0.5  # seconds between two looks at what others do

Progress = Callable[[int, int, Trial], None]


def search(
    space: SearchSpace,
    objective: Objective | RacingObjective,
    *,
    values: tuple[str, ...],
    algorithm: str = "random",
    trials: int,
    storage: Path | str | None = None,
    study: str = "elastune",
    seed: int = 0,
    start: Sequence[SubnetConfig] = (),
    known: Known | None = None,
    progress: Progress | None = None,
    seconds: float | None = None,
) -> SearchResult:
    """Try configurations until there are ``trials`` of them, those already stored included.

    The same call in several processes with the same storage is several workers: each trial is made
    by one of them, none twice, and every call returns all trials once all are finished. What a
    worker that died was measuring is tried again by another.

    With one worker the sequence of trials depends on (space, algorithm, seed, start) and the values
    measured alone, so a killed search that goes on makes the same trials as an uninterrupted one. A
    trial that measures as NaN or infinite, or that runs out of memory, is kept as failed, with a
    warning, and the search goes on.

    Args:
        space: what to choose from.
        objective: measures a configuration; every value is minimised. One with a method ``measure``
            is given the front so far, and may stop early.
        values: names of the objective's values, quality first. What else it measures is kept, too.
        algorithm: a key of `ALGORITHMS`.
        trials: how many configurations to have tried at the end; never more than the space holds.
            There are fewer where the algorithm has nothing left to propose, or time is up.
        storage: path of a journal file, URL of a database (``postgresql://...``), or None: memory.
        study: name of the search, where a storage has several.
        seed: of the proposals.
        start: configurations to try before those of the algorithm, in this order; they count as
            trials.
        known: what algorithms may know besides the history.
        progress: called with (trials done, trials in all, trial) after each trial of this worker.
        seconds: no trial begins later than this after the call.

    Raises:
        BadRecipe: unknown algorithm; a database that cannot be reached.
        InvalidSubnet: a start that is not in the space.
        BadArtifact: the journal is corrupt, of another space or of other objectives.
        ElastuneError: all trials failed.
    """
    began = time.monotonic()
    propose = _algorithm(algorithm)
    known = known or Known(values)
    for config in start:
        space.check(config)
    # Optuna takes a second to import; spaces and results do without it.
    from elastune.search.store import TrialStore
    from elastune.search.workers import at_work

    store = TrialStore(storage, values, study=study, limits=known.limits)
    try:
        _check_space(store, space)
        with at_work(store.beat if store.shared else None) as worker:
            found = _Searcher(
                store=store,
                worker=worker,
                space=space,
                objective=objective,
                propose=propose,
                total=min(trials, space.size),
                seed=seed,
                start=start,
                known=known,
                progress=progress,
                deadline=math.inf if seconds is None else began + seconds,
            ).run()
    finally:
        store.close()
    result = SearchResult(tuple(found))
    if found:
        result.best()  # which says so when all have failed
    return result


def _algorithm(name: str) -> Propose:
    # The table of algorithms stands where they are imported.
    from elastune.search import ALGORITHMS

    if name not in ALGORITHMS:
        raise BadRecipe(
            f"unknown search algorithm {name!r}{nearest(name, ALGORITHMS)}; "
            f"known are {', '.join(ALGORITHMS)}"
        )
    return ALGORITHMS[name]


def _check_space(store: TrialStore, space: SearchSpace) -> None:
    """Refuse a store whose trials are of another space."""
    board = store.read()
    configs = (*board.dropped, *(trial.config for trial in board.trials))
    if any(config not in space for config in configs):
        raise BadArtifact(f"the {store.name} is of another search space", try_=store.way_out)


@dataclass
class _Searcher:
    """A worker's part of a search.

    Tickets propose in the order of their numbers: a ticket waits until those before it have said
    what they try, so that it can propose something else. Measuring needs no order.
    """

    store: TrialStore
    worker: Worker
    space: SearchSpace
    objective: Objective | RacingObjective
    propose: Propose
    total: int
    seed: int
    start: Sequence[SubnetConfig]
    known: Known
    progress: Progress | None
    deadline: float
    # (trials, those finished) when nothing was left to propose; other workers' may change that.
    exhausted: tuple[int, int] | None = field(default=None, init=False)
    cause: str | None = field(default=None, init=False)
    history: History = field(default_factory=History, init=False)

    def run(self) -> list[Trial]:
        """Make trials until there are enough, and wait for those of the others."""
        made: SubnetConfig | None = None
        looks = 0
        while True:
            board = self._read()
            if made is not None:
                self._report(board, made)
            made = None
            may_try = (
                self.exhausted is None
                or bool(board.orphans)
                or self.exhausted != _progress_of(board.trials)
            )
            if len(board.live) < self.total and may_try and not self._is_late:
                made, looks = self._try_one(), 0
            elif board.running:
                looks = _pause(looks)
            else:
                return list(board.trials)

    @property
    def _is_late(self) -> bool:
        return time.monotonic() >= self.deadline

    def _read(self) -> Board:
        """Look at all tickets, after those of dead workers are given up."""
        board = self.store.read()
        return self.store.read() if self.store.abandon_dead(board) else board

    def _try_one(self) -> SubnetConfig | None:
        """Propose and measure a configuration; None if there is none to be tried."""
        self.store.open_ticket(self.worker)
        try:
            board = self._turn()
            # Without a board another worker took this one for dead.
            config = None if board is None else self._choose(board)
            if board is None or config is None or not self.store.claim(config):
                return None
            if self.store.finish(self._measure(config)):
                return config
            _LOG.warning("another worker took this one for dead, and its trial with it")
            return None
        finally:
            self.store.abandon()

    def _turn(self) -> Board | None:
        """Wait until all tickets before the own one have a configuration; return those alone."""
        looks = 0
        while True:
            board = self._read()
            place = board.place(self.worker)
            if place is None:
                return None
            before = board.before(place)
            if len(before.trials) == place:
                return before
            looks = _pause(looks)

    def _choose(self, board: Board) -> SubnetConfig | None:
        """Return what to try next; None if there are enough trials, or nothing is left."""
        history = self.history = self.history.grown(board.trials)
        if len(history) >= self.total or self._is_late:
            return None
        if board.orphans:
            return board.orphans[0]
        tried = history.tried
        given = next((config for config in self.start if config not in tried), None)
        if given is not None:
            return given
        rng = np.random.default_rng((self.seed, len(history)))
        config = self.propose(self.space, history, rng, self.known)
        if config is None:
            self.exhausted = _progress_of(history)
        elif config in tried:
            raise RuntimeError(f"{self.propose.__module__} proposed {config!r} again")
        return config

    def _measure(self, config: SubnetConfig) -> Measurement:
        self.cause = None
        try:
            if hasattr(self.objective, "measure"):
                return self.objective.measure(config, self.history.front)
            return Measurement(self.objective(config))
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            self.cause = "out of memory"
        return Measurement(dict.fromkeys(self.known.values, math.nan))

    def _report(self, board: Board, config: SubnetConfig) -> None:
        """Tell what became of an own trial."""
        trial = next(trial for trial in reversed(board.trials) if trial.config == config)
        if trial.failed:
            found = ", ".join(f"{name} {value}" for name, value in trial.values.items())
            found = self.cause or found
            _LOG.warning("trial %d failed: %s for %s", trial.number, found, config.short())
        if self.progress is not None:
            self.progress(len(board.live) - len(board.running), self.total, trial)


def _progress_of(trials: Sequence[Trial]) -> tuple[int, int]:
    return len(trials), sum(math.isfinite(next(iter(t.values.values()))) for t in trials)


def _pause(looks: int) -> int:
    """Wait, the longer the more often it was in vain; return how often that was."""
    time.sleep(min(_SHORTEST * 1.25**looks, _LONGEST))
    return min(looks + 1, 50)


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out, without importing what knows of a device's."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return not names.isdisjoint({"MemoryError", "OutOfMemoryError"})
