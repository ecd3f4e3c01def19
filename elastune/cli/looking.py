"""Commands that only look."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elastune.cli.frame import (
    Json,
    reported,
    show,
)


def report(
    source: Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")],
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


def doctor(json_: Json = False) -> None:
    """Show versions, devices and what is installed."""
    with reported():
        from elastune.doctor import doctor_table, examine

        facts = examine()
        show(facts if json_ else doctor_table(facts))
