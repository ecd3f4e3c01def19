"""Trials on disk: an Optuna study whose trials carry the configuration as one attribute.

Optuna's own parameters cost a row each (about 1.5 s a trial at 210 dims); one JSON attribute costs
milliseconds, and the journal still opens in Optuna's dashboard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from elastune.errors import BadArtifact
from elastune.search.base import Trial
from elastune.space import SubnetConfig

_STUDY = "elastune"


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
        self.values = values
        try:
            storage = JournalStorage(JournalFileBackend(str(path)))
            self._study = optuna.create_study(
                storage=storage,
                study_name=_STUDY,
                directions=["minimize"] * len(values),
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(),
            )
        except (ValueError, json.JSONDecodeError, KeyError) as error:
            raise BadArtifact(
                f"the search journal {path} cannot be read: {error}", try_="delete it"
            ) from error
        if len(self._study.directions) != len(values):
            raise BadArtifact(f"{path} was made for other objectives", try_="delete it")

    def trials(self) -> list[Trial]:
        """Return the finished trials, numbered from 0 in the order they were finished in."""
        finished = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return [
            Trial(
                number,
                SubnetConfig.from_json(trial.user_attrs["config"]),
                dict(zip(self.values, trial.values, strict=True)),
            )
            for number, trial in enumerate(finished)
        ]

    def add(self, config: SubnetConfig, values: Mapping[str, float]) -> None:
        """Record a finished trial."""
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.COMPLETE,
                values=[values[name] for name in self.values],
                user_attrs={"config": config.to_json()},
            )
        )
