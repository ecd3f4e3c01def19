"""Trials in an Optuna study: each carries its configuration as one attribute.

Optuna's own parameters cost a row each (about 1.5 s a trial at 210 dims); one JSON attribute costs
milliseconds, and the study still opens in Optuna's dashboard.

A worker that is about to try something opens a *ticket*: a running trial of the study. Tickets are
numbered by the storage, which makes them the one thing that workers agree on. A ticket without
values that has failed is *abandoned*: it does not count, and its configuration is tried again. One
whose workers died `DEATHS` times is what kills them: it becomes a failed trial.
"""

from __future__ import annotations

import base64
import dataclasses
import logging
import math
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from elastune.errors import BadArtifact, ElastuneError, InvalidSubnet
from elastune.search.base import Measurement, Trial
from elastune.search.board import Board, Rows, Ticket
from elastune.search.storages import open_storage
from elastune.search.workers import GRACE_SECONDS, Worker
from elastune.space import SubnetConfig

_CONFIG, _WORKER, _BEAT = "config", "worker", "beat"
_VALUES = "values"  # attribute of failed trials
_RESULT = "result"  # what is known besides the values
_OUTCOMES = "outcomes"
_DIED = "died"  # attribute of abandoned trials whose worker was gone
DEATHS = 2
"""Workers that may die of a configuration before it counts as failed."""
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, AssertionError, InvalidSubnet)
_GONE = "a worker of the search is gone; its trial (%s) is %s"
_LOG = logging.getLogger(__name__)


class TrialStore:
    """The history of one search, kept through kills and shared by workers.

    Args:
        storage: path of a journal file, URL of a database, or None for memory.
        values: names of the objectives, all minimised; the first is the quality.
        study: name of the search in a storage of several.
        limits: name of a value -> the least and the most that it may be, for `Trial.violation`.

    Raises:
        BadArtifact: the journal cannot be read, or belongs to other objectives.
        BadRecipe: the database cannot be reached, or its driver is missing.
    """

    def __init__(
        self,
        storage: Path | str | None,
        values: tuple[str, ...],
        *,
        study: str = "elastune",
        limits: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.values = values
        self._limits = dict(limits or {})
        self._settled = Rows()  # up to the first ticket that is running
        self._finished: dict[int, Ticket] = {}  # behind it
        self._signs: dict[int, tuple[object, float]] = {}
        self._open: int | None = None  # Optuna's id of the worker's own ticket
        self.name, self.way_out = f"search journal {storage}", "delete it"
        with self._talking():
            self._opened = open_storage(storage)
            self._storage = self._opened.storage
            self.name, self.way_out = self._opened.name, self._opened.way_out
        try:
            self._load(study)
        except BaseException:
            self.close()
            raise

    def _load(self, study_name: str) -> None:
        """Load the study, or make it."""
        with self._talking():
            study = optuna.create_study(
                storage=self._storage,
                study_name=study_name,
                directions=["minimize"] * len(self.values),
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(),
            )
            self._study_id = self._storage.get_study_id_from_name(study_name)
            names = study.user_attrs.get("values")
            is_new = names is None and not study.get_trials(deepcopy=False)
            if is_new:
                study.set_user_attr("values", list(self.values))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ExperimentalWarning)
                    study.set_metric_names(list(self.values))
        if not is_new and names != list(self.values):
            raise BadArtifact(
                f"the {self.name} was made for other objectives: {names or 'unknown'}",
                try_=self.way_out,
            )

    @property
    def shared(self) -> bool:
        """Whether other processes can see it."""
        return self._opened.shared

    def close(self) -> None:
        """Give back connections."""
        self._opened.close()

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Name the storage in whatever goes wrong with it."""
        try:
            yield
        # Optuna replays a journal's lines as they are, so that damage shows as any of these.
        except _DAMAGE as error:
            raise BadArtifact(
                f"the {self.name} cannot be read: {error!r}", try_=self.way_out
            ) from error
        except StorageInternalError as error:
            raise ElastuneError(
                f"the {self.name} does not answer: {error.__cause__ or error}",
                try_="the same again, once it does: a search goes on where it stopped",
            ) from error

    # --- reading ----------------------------------------------------------------------------------

    def read(self) -> Board:
        """Return how all tickets stand.

        Raises:
            BadArtifact: a trial that is none of ours.
        """
        with self._talking():
            found = self._storage.get_all_trials(self._study_id, deepcopy=False)
            settled = self._settled
            # Numbers are counted from 0, so that a place in the list is one.
            while settled.n < len(found) and found[settled.n].state.is_finished():
                self._add(found[settled.n], settled)
                self._finished.pop(settled.n, None)
                settled.n += 1
            rows = settled.copy()
            for frozen in found[settled.n :]:
                self._add(frozen, rows)
        return Board(tuple(rows.live), tuple(rows.dropped), tuple(rows.deadly), len(settled.live))

    def _add(self, frozen: FrozenTrial, rows: Rows) -> None:
        """Put a ticket where it belongs; one that has finished is read once."""
        ticket = self._finished.get(frozen.number) or self._ticket(frozen)
        if not frozen.state.is_finished():
            rows.live.append(self._placed(ticket, len(rows.live)))
            return
        if _is_abandoned(frozen):
            if ticket.trial is not None:
                rows.dropped.append(ticket.trial.config)
                if _DIED in frozen.user_attrs:
                    rows.deadly.append(ticket.trial.config)
        else:
            ticket = self._placed(ticket, len(rows.live))
            rows.live.append(ticket)
        self._finished[frozen.number] = ticket

    def trials(self) -> list[Trial]:
        """Return the finished trials, numbered from 0 in the order they were proposed in.

        Those that failed are among them.

        Raises:
            BadArtifact: a trial that is none of ours.
        """
        return [t.trial for t in self.read().live if t.trial is not None and not t.running]

    @staticmethod
    def _placed(ticket: Ticket, number: int) -> Ticket:
        """Number a ticket's trial among the live ones: earlier ones may have been abandoned."""
        if ticket.trial is None or ticket.trial.number == number:
            return ticket
        return dataclasses.replace(ticket, trial=dataclasses.replace(ticket.trial, number=number))

    def _ticket(self, frozen: FrozenTrial) -> Ticket:
        attrs = frozen.user_attrs
        running = not frozen.state.is_finished()
        worker = Worker.from_dict(attrs.get(_WORKER))
        if (running or _is_abandoned(frozen)) and _CONFIG not in attrs:
            return Ticket(frozen.number, None, running, worker, attrs.get(_BEAT))
        result = attrs.get(_RESULT, {})
        values = dict(zip(self.values, self._values_of(frozen), strict=True))
        measured = {name: float(value) for name, value in result.get("measured", {}).items()}
        trial = Trial(
            number=-1,
            config=SubnetConfig.from_json(attrs[_CONFIG]),
            values=values,
            measured=measured,
            dropped=result.get("dropped", False),
            outcomes=_unpacked(attrs[_OUTCOMES]) if _OUTCOMES in attrs else None,
            equivalents=result.get("equivalents", 1.0),
            violation=_violation({**measured, **values}, self._limits),
        )
        return Ticket(frozen.number, trial, running, worker, attrs.get(_BEAT))

    def _values_of(self, frozen: FrozenTrial) -> Sequence[float]:
        if frozen.state == TrialState.COMPLETE:
            return frozen.values
        texts = frozen.user_attrs.get(_VALUES) if frozen.state == TrialState.FAIL else None
        return [math.nan] * len(self.values) if texts is None else [float(text) for text in texts]

    # --- writing ----------------------------------------------------------------------------------

    def open_ticket(self, worker: Worker) -> None:
        """Open a ticket for a worker of this process, who has no other one open."""
        template = create_trial(state=TrialState.RUNNING, user_attrs={_WORKER: worker.to_dict()})
        with self._talking():
            self._open = self._storage.create_new_trial(self._study_id, template)

    def claim(self, config: SubnetConfig) -> bool:
        """Tell everybody what the open ticket tries; False if the ticket was taken away."""
        assert self._open is not None
        with self._talking(), suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(self._open, _CONFIG, config.to_json())
            return True
        self._open = None
        return False

    def finish(self, found: Measurement) -> bool:
        """Record what the open ticket measures, as failed if a value is NaN or infinite.

        Returns:
            False if the ticket was taken away: nothing is recorded then.
        """
        assert self._open is not None
        ordered = [float(found.values[name]) for name in self.values]
        rest = {n: _as_json(float(v)) for n, v in found.values.items() if n not in self.values}
        attrs: dict[str, Any] = {}
        if rest or found.dropped or found.equivalents != 1:
            equivalents = float(found.equivalents)
            attrs[_RESULT] = {
                "measured": rest,
                "dropped": bool(found.dropped),
                "equivalents": equivalents,
            }
        if found.outcomes is not None:
            attrs[_OUTCOMES] = _packed(found.outcomes)
        failed = not all(map(math.isfinite, ordered))
        if failed:
            # Optuna keeps no values of failed trials, and JSON has no NaN.
            attrs[_VALUES] = [str(value) for value in ordered]
        state = TrialState.FAIL if failed else TrialState.COMPLETE
        told = False
        with self._talking(), suppress(UpdateFinishedTrialError):
            for name, value in attrs.items():
                self._storage.set_trial_user_attr(self._open, name, value)
            self._storage.set_trial_state_values(self._open, state, None if failed else ordered)
            told = True
        self._open = None
        return told

    def abandon(self) -> None:
        """Give up the open ticket, if there is one."""
        ticket, self._open = self._open, None
        if ticket is not None:
            with self._talking(), suppress(UpdateFinishedTrialError):
                self._storage.set_trial_state_values(ticket, TrialState.FAIL)

    def abandon_dead(self, board: Board) -> bool:
        """Give up, or fail, the tickets of workers that are gone; tell whether there were any."""
        dead = [ticket for ticket in board.running if self._is_dead(ticket)]
        for ticket in dead:
            config = None if ticket.trial is None else ticket.trial.config
            is_last = config is not None and board.deadly.count(config) + 1 >= DEATHS
            attribute = (_VALUES, ["nan"] * len(self.values)) if is_last else (_DIED, True)
            end = "failed: it has had its chances" if is_last else "taken up again"
            shown = "none yet" if config is None else config.short()
            _LOG.log(logging.WARNING if is_last else logging.INFO, _GONE, shown, end)
            # Of several that see it, one is the first; it is finished for the others.
            with self._talking(), suppress(UpdateFinishedTrialError):
                number = self._storage.get_trial_id_from_study_id_trial_number(
                    self._study_id, ticket.number
                )
                self._storage.set_trial_user_attr(number, *attribute)
                self._storage.set_trial_state_values(number, TrialState.FAIL)
        return bool(dead)

    def beat(self) -> None:
        """Give a sign of life for the open ticket. For another thread than the worker's."""
        ticket = self._open
        if ticket is None:
            return
        try:
            self._storage.set_trial_user_attr(ticket, _BEAT, time.time())
        # The ticket was finished meanwhile, or the storage is away: the worker itself will say so.
        except Exception as error:
            _LOG.debug("no sign of life: %r", error)

    def _is_dead(self, ticket: Ticket) -> bool:
        gone = None if ticket.worker is None else ticket.worker.is_gone()
        if gone is not None:
            return gone
        now = time.monotonic()
        beat, since = self._signs.get(ticket.number, (None, now))
        if ticket.number not in self._signs or beat != ticket.beat:
            self._signs[ticket.number] = (ticket.beat, now)
            return False
        return now - since > GRACE_SECONDS


def _is_abandoned(frozen: FrozenTrial) -> bool:
    return frozen.state == TrialState.PRUNED or (
        frozen.state == TrialState.FAIL and _VALUES not in frozen.user_attrs
    )


def _violation(table: Mapping[str, float], limits: Mapping[str, tuple[float, float]]) -> float:
    """Return by how much limits are missed, each as a part of itself; absent values miss none."""
    total = 0.0
    for name, (low, high) in limits.items():
        value = table.get(name, math.nan)
        for excess, limit in ((low - value, low), (value - high, high)):
            if excess > 0 and math.isfinite(excess):
                total += excess / (abs(limit) or 1.0)
    return total


def _as_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _packed(outcomes: np.ndarray) -> str:
    content = np.ascontiguousarray(outcomes, dtype="<f4").tobytes()
    return base64.b64encode(zlib.compress(content)).decode("ascii")


def _unpacked(text: str) -> np.ndarray:
    content = zlib.decompress(base64.b64decode(text))
    return np.frombuffer(content, dtype="<f4").astype(np.float32)
