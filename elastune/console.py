"""What the command line shows while a run is at work: rich progress bars and lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from elastune.progress import Bar, Reporter

_TITLE_WIDTH = 26


class _Facts(ProgressColumn):
    """Count, rate, time left and the note in one piece, so that what is cropped is the note."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis", ratio=1))

    def render(self, task: Task) -> Text:
        count = f"{task.completed:.0f}/{task.total or 0:.0f}"
        parts = [count, _rate(task), _clock(task), str(task.fields["note"])]
        return Text("  ".join(part for part in parts if part))


class ConsoleReporter(Reporter):
    """Draws progress on a terminal; on anything else, one line when a piece of work ends."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, highlight=False, markup=False)

    @contextmanager
    def bar(self, title: str, unit: str) -> Iterator[Bar]:
        """Show a bar with count, rate, time left (in the end, time spent) and a note."""
        progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=10),
            _Facts(),
            console=self.console,
            expand=True,
        )
        if len(title) > _TITLE_WIDTH:
            title = title[: _TITLE_WIDTH - 1] + "…"
        with progress:
            task = progress.add_task(title, total=1, unit=unit, note="", begun=None)

            def show(done: float, total: float, note: str = "") -> None:
                # What a run that was killed had done counts as done, not as fast.
                begun = progress.tasks[task].fields["begun"]
                begun = done if begun is None else begun
                progress.update(task, completed=done, total=total, note=note, begun=begun)

            yield show


def _speed(task: Task) -> float:
    """Return units a second since the start; 0 while unknown.

    Batches finish many units at once, so a rate over the last few seconds would jump about.
    """
    elapsed = task.finished_time if task.finished else task.elapsed
    begun = task.fields["begun"] or 0
    done = task.completed - (begun if begun < task.completed else 0)
    return done / elapsed if elapsed else 0.0


def _rate(task: Task) -> str:
    """Return units a second, or seconds a unit where that reads better."""
    speed = _speed(task)
    unit = str(task.fields["unit"])
    if not speed:
        return ""
    if speed >= 10_000:
        return f"{speed / 1000:.0f}k {unit}/s"
    return f"{speed:.1f} {unit}/s" if speed >= 1 else f"{1 / speed:.1f} s/{unit.rstrip('s')}"


def _clock(task: Task) -> str:
    """Return the time left, and in the end the time spent."""
    if task.finished:
        return f"in {_minutes(task.finished_time or 0)}"
    speed = _speed(task)
    left = _minutes(((task.total or 0) - task.completed) / speed) if speed else "-:--"
    return f"left {left}"


def _minutes(seconds: float) -> str:
    """Return ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02}"
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
