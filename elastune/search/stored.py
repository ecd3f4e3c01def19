"""What searches have stored, read without taking part in any."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from elastune.search.base import Trial
from elastune.search.storages import open_storage
from elastune.search.store import TrialStore


def stored_trials(
    storage: Path | str | None, studies: Mapping[str, tuple[str, ...]]
) -> list[Trial]:
    """Return the finished trials of some searches, in the order of their names here.

    Args:
        storage: as of a `TrialStore`. A journal that does not exist holds no search.
        studies: name of a search -> the names of its objectives; the storage may lack it.

    Raises:
        BadArtifact: the journal cannot be read, or a search has other objectives.
        BadRecipe: the database cannot be reached, or its driver is missing.
    """
    if isinstance(storage, Path) and not storage.exists():
        return []
    found: list[Trial] = []
    for name in _among(storage, studies):
        store = TrialStore(storage, studies[name], study=name)
        try:
            found += store.trials()
        finally:
            store.close()
    return found


def check_storage(storage: Path | str | None) -> None:
    """Open a storage and close it again.

    Raises:
        BadRecipe: a database that cannot be reached, or whose driver is missing.
    """
    if isinstance(storage, str):
        open_storage(storage).close()


def _among(storage: Path | str | None, names: Mapping[str, object]) -> list[str]:
    """Return which of some searches a storage holds."""
    opened = open_storage(storage)
    try:
        there = {study.study_name for study in opened.storage.get_all_studies()}
    finally:
        opened.close()
    return [name for name in names if name in there]
