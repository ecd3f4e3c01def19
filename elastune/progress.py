"""How stages tell what they are doing; silent unless the command line listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """Shows how far one piece of work is."""

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """Show ``done`` of ``total``, and a short note such as the current loss."""


class Reporter:
    """Listens to a run. This one keeps silent; the command line's draws progress bars."""

    def say(self, text: str) -> None:
        """Tell one line about what was found or skipped."""

    @contextmanager
    def bar(self, title: str, unit: str) -> Iterator[Bar]:
        """Show a progress bar as long as the context lasts."""
        yield _ignore


def _ignore(done: float, total: float, note: str = "") -> None:
    """Show nothing."""
