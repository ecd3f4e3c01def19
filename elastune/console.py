"""What the command line shows while a run is at work: rich progress bars and lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from elastune.progress import Bar, Reporter


class _RateColumn(ProgressColumn):
    """Units a second, or seconds a unit where that reads better."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = str(task.fields["unit"])
        if not speed:
            return Text("")
        if speed >= 1:
            return Text(f"{speed:.1f} {unit}/s", style="progress.data.speed")
        return Text(f"{1 / speed:.1f} s/{unit.rstrip('s')}", style="progress.data.speed")


class ConsoleReporter(Reporter):
    """Draws progress on a terminal; on anything else, one line when a piece of work ends."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, highlight=False, markup=False)

    @contextmanager
    def bar(self, title: str, unit: str) -> Iterator[Bar]:
        """Show a bar with rate, time spent, time left and a note."""
        progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            _RateColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            # Runs take minutes: a rate over the last few seconds would jump about.
            speed_estimate_period=300,
        )
        with progress:
            task = progress.add_task(title, total=1, unit=unit, note="")

            def show(done: float, total: float, note: str = "") -> None:
                progress.update(task, completed=done, total=total, note=note)

            yield show
