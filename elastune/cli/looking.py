"""Commands that only look."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elastune.cli import completion
from elastune.cli.frame import Json, RunFolder, reported, show


def report(
    source: RunFolder,
    json_: Json = False,
) -> None:
    """Write RUN/report.html and print its main table."""
    with reported():
        from elastune.artifacts import RunDirectory
        from elastune.report import metrics_table, write_report

        directory = RunDirectory(source)
        directory.recipe()
        page = write_report(source)
        metrics = directory.metrics()
        show({"report": str(page), **metrics} if json_ else metrics_table(metrics))
        if not json_:
            show(f"report: {page}")


def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Run directories, or folders of them; ./runs by default.",
            autocompletion=completion.runs,
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Systems to show, such as best or sparse.")
    ] = None,
    json_: Json = False,
) -> None:
    """Compare runs side by side: state, time, scores, costs, and the settings that differ."""
    with reported():
        from elastune.report import differences_table, find_runs, read_run, runs_table

        found = [read_run(folder) for folder in find_runs(folders or [Path("runs")])]
        if json_:
            show({"runs": found})
            return
        show(runs_table(found, only))
        differences = differences_table(found)
        if differences is not None:
            show(differences)


def doctor(json_: Json = False) -> None:
    """Show versions, devices and what is installed."""
    with reported():
        from elastune.doctor import doctor_table, examine

        facts = examine()
        show(facts if json_ else doctor_table(facts))
