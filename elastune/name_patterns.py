"""Choices given by patterns over dim names, such as ``{"*": [32, 16], "layers.0.*": [32]}``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Generic, TypeVar

Number = TypeVar("Number", int, float)


class NamePatterns(Generic[Number]):
    """Finds the choices of each name, and notes which patterns were of use.

    Args:
        given: choices for all names, or a mapping from patterns to choices, of which the last that
            matches wins.
    """

    def __init__(self, given: Sequence[Number] | Mapping[str, Sequence[Number]]) -> None:
        self._given: Mapping[str, Sequence[Number]] = (
            given if isinstance(given, Mapping) else {"*": given}
        )
        self._used: set[str] = set()

    def choices_of(self, name: str) -> Sequence[Number] | None:
        """Return the choices of ``name``; None where no pattern matches."""
        matching = [pattern for pattern in self._given if fnmatchcase(name, pattern)]
        self._used.update(matching)
        return self._given[matching[-1]] if matching else None

    @property
    def unused(self) -> list[str]:
        """The patterns that matched no name so far."""
        return [pattern for pattern in self._given if pattern not in self._used]
