"""What exporting and checking tell, whatever the format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elastune.export.reference import Agreement


@dataclass(frozen=True)
class Export:
    """A finished export, proved in a fresh process.

    Attributes:
        folder: where.
        format: its name.
        weights: how they are kept.
        runtime: the package that loads it.
        loads_with: what loads it, in a few words.
        largest_difference: between its outputs and those of the torch model.
        n_bytes: of all files but the reference that proves it.
        files: their names.
        seconds: to write it, the check left out.
        agreement: more of how they compare, where the format tells it.
        code: Python lines that load and run it, from inside the folder, where the format has some;
            the README.md has them in any case.
        notes: what else the user should know, a sentence each.
    """

    folder: Path
    format: str
    weights: str
    runtime: str
    loads_with: str
    largest_difference: float
    n_bytes: int
    files: tuple[str, ...]
    seconds: float
    agreement: Agreement | None = None
    code: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The format, and how weights are kept where they are rounded."""
        plain = self.weights == "float32" or self.format == "compressed-tensors"
        return self.format if plain else f"{self.format}:{self.weights}"


@dataclass(frozen=True)
class Checked:
    """An export that computes in a fresh process what was recorded with it.

    Attributes:
        folder: where.
        format: its name.
        runtime: what ran it.
        largest_difference: of an output; None where zeros are what is checked.
        agreement: more of how they compare, where the format tells it.
        zeros: counted in all weights, of ``merged-sparse``.
    """

    folder: Path
    format: str
    runtime: str
    largest_difference: float | None = None
    agreement: Agreement | None = None
    zeros: int | None = None
