"""Optuna's dashboard shows a search while it runs, and afterwards."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from search_worker import SPACE, VALUES, measure

from elastune.search import SearchResult, search

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("optuna_dashboard") is None, reason="optuna-dashboard is not installed"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SearchResult]:
    journal = tmp_path_factory.mktemp("dashboard") / "study.journal"
    return journal, search(
        SPACE, measure, values=VALUES, trials=7, storage=journal, study="shears-ranks"
    )


@pytest.fixture(scope="module")
def address(found: tuple[Path, SearchResult]) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "from optuna_dashboard._cli import main; main()"
    command = [sys.executable, "-c", start, str(found[0]), "--host", "127.0.0.1"]
    server = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            assert time.monotonic() < deadline, "the dashboard does not answer"
            assert server.poll() is None, "the dashboard ended"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


def asked(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.load(answer)


def test_the_dashboard_serves_every_trial(address: str, found: tuple[Path, SearchResult]) -> None:
    [study] = asked(f"{address}/api/studies")["study_summaries"]
    assert study["study_name"] == "shears-ranks"
    detail = asked(f"{address}/api/studies/{study['study_id']}")
    assert detail["objective_names"] == list(VALUES)
    for shown, trial in zip(detail["trials"], found[1].trials, strict=True):
        assert shown["state"] == "Complete"
        assert shown["values"] == list(trial.values.values())
        attrs = {attr["key"]: attr["value"] for attr in shown["user_attrs"]}
        assert json.loads(attrs["config"]) == dict(trial.config)


def test_a_browser_shows_the_study_and_its_trials(address: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium to open the page with")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    url = f"{address}/dashboard/studies/0/trials"
    page = subprocess.run(
        [browser, *options, "--virtual-time-budget=10000", "--dump-dom", url],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert "shears-ranks" in text
    assert "7 Trials" in text
    assert all(f"Trial {number} Complete" in text for number in range(7))
