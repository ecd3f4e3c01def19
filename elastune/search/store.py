"""Trials on disk: an Optuna study whose trials carry the configuration as one attribute.

Optuna's own parameters cost a row each (about 1.5 s a trial at 210 dims); one JSON attribute costs
milliseconds, and the journal still opens in Optuna's dashboard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from elastune.errors import BadArtifact, InvalidSubnet
from elastune.search.base import Trial
from elastune.space import SubnetConfig

_STUDY = "elastune"
_VALUES = "values"  # attribute of failed trials
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, AssertionError)


class TrialStore:
    """The history of one search, kept through kills and shared by workers.

    Args:
        path: of the journal file.
        values: names of the objectives, all minimised; the first is the quality.

    Raises:
        BadArtifact: the journal cannot be read, or belongs to other objectives.
    """

    def __init__(self, path: Path, values: tuple[str, ...]) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.values = values
        _cut_torn_line(path)
        with self._reading():
            storage = JournalStorage(JournalFileBackend(str(path)))
            self._study = optuna.create_study(
                storage=storage,
                study_name=_STUDY,
                directions=["minimize"] * len(values),
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(),
            )
            names = self._study.user_attrs.get("values")
            is_new = names is None and not self._study.get_trials(deepcopy=False)
        if is_new:
            self._study.set_user_attr("values", list(values))
        elif names != list(values):
            raise BadArtifact(
                f"{path} was made for other objectives: {names or 'unknown'}", try_="delete it"
            )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Name the journal in whatever goes wrong with its content."""
        try:
            yield
        # Optuna replays the lines as they are, so that damage shows as any of these.
        except (*_DAMAGE, InvalidSubnet) as error:
            raise BadArtifact(
                f"the search journal {self.path} cannot be read: {error!r}", try_="delete it"
            ) from error

    def trials(self) -> list[Trial]:
        """Return the finished trials, numbered from 0 in the order they were finished in.

        Those that failed are among them.

        Raises:
            BadArtifact: a trial that is none of ours.
        """
        states = (TrialState.COMPLETE, TrialState.FAIL)
        with self._reading():
            finished = self._study.get_trials(deepcopy=False, states=states)
            return [
                Trial(
                    number,
                    SubnetConfig.from_json(trial.user_attrs["config"]),
                    dict(zip(self.values, _values_of(trial), strict=True)),
                )
                for number, trial in enumerate(finished)
            ]

    def add(self, config: SubnetConfig, values: Mapping[str, float]) -> None:
        """Record a finished trial: as failed if a value is NaN or infinite."""
        ordered = [float(values[name]) for name in self.values]
        attrs: dict[str, Any] = {"config": config.to_json()}
        failed = not all(map(math.isfinite, ordered))
        if failed:
            # Optuna keeps no values of failed trials, and JSON has no NaN.
            attrs[_VALUES] = [str(value) for value in ordered]
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.FAIL if failed else TrialState.COMPLETE,
                values=None if failed else ordered,
                user_attrs=attrs,
            )
        )


def _values_of(trial: FrozenTrial) -> list[float]:
    if trial.state == TrialState.FAIL:
        return [float(value) for value in trial.user_attrs[_VALUES]]
    return trial.values


def _cut_torn_line(path: Path) -> None:
    """Cut off a last line that a kill left unfinished: the next line would be glued to it."""
    if not path.exists() or not path.stat().st_size:
        return
    lock = JournalFileSymlinkLock(str(path))  # the one that Optuna's writers take
    lock.acquire()
    try:
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        start = b'{"op_code"'[: len(content)]
        if end < len(content) and content.startswith(start):
            with path.open("r+b") as file:
                file.truncate(end)
    finally:
        lock.release()
