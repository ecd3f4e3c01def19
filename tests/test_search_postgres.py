"""Workers that share a search through a PostgreSQL server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from postgres_server import NoServer, postgres
from search_worker import SPACE, VALUES, check_three_workers_one_of_which_is_killed, measure

from elastune.errors import BadRecipe
from elastune.search import search
from elastune.search.store import TrialStore


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = postgres()
    try:
        address = server.__enter__()
    except NoServer as error:
        pytest.skip(f"no PostgreSQL server can be started: {error}")
    yield address
    server.__exit__(None, None, None)


def test_three_workers_on_postgresql_lose_nothing_when_one_is_killed(
    url: str, tmp_path: Path
) -> None:
    check_three_workers_one_of_which_is_killed(tmp_path, url)


def test_a_broken_search_in_postgresql_goes_on_to_the_trials_of_a_journal(
    url: str, tmp_path: Path
) -> None:
    options: Any = {"values": VALUES, "algorithm": "hill_climb", "seed": 4}
    calls = []

    def breaks(config: Any) -> dict[str, float]:
        calls.append(config)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(config)

    with pytest.raises(KeyboardInterrupt):
        search(SPACE, breaks, trials=8, storage=url, study="broken", **options)
    resumed = search(SPACE, measure, trials=8, storage=url, study="broken", **options)
    whole = search(SPACE, measure, trials=8, storage=tmp_path / "journal", **options)
    assert resumed == whole  # values are exact
    store = TrialStore(url, VALUES, study="broken")
    assert store.trials() == list(whole.trials)
    store.close()


def test_a_database_that_the_server_lacks_is_named(url: str) -> None:
    other = url.replace("/postgres?", "/lacking?")
    with pytest.raises(BadRecipe, match=r'database "lacking" does not exist\ntry: start'):
        search(SPACE, measure, trials=1, values=VALUES, storage=other)
