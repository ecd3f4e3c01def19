"""The errors a user can meet: each says what was given, what is allowed and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ElastuneError(Exception):
    """Bad input. The command line prints it as one message and exits with code 2.

    Args:
        message: what was given and what is allowed, in the user's words.
        try_: the way out, printed on a line of its own.
    """

    def __init__(self, message: str, *, try_: str | None = None) -> None:
        self.message = message
        self.try_ = try_
        super().__init__(message if try_ is None else f"{message}\ntry: {try_}")


class InvalidSpace(ElastuneError):
    """A search space that cannot be built or does not fit the model."""


class InvalidSubnet(ElastuneError):
    """A sub-network configuration that is not in its search space."""


class UnsupportedModel(ElastuneError):
    """A model whose structure is not known, or that lacks what was asked for."""


class BadRecipe(ElastuneError):
    """A recipe, option or command-line value that cannot be used."""


class BadData(ElastuneError):
    """Data that is missing, empty, malformed, or leaks between splits."""


class BadArtifact(ElastuneError):
    """A file of a run directory or checkpoint that is missing, corrupt or of another run."""


class TrainingDiverged(ElastuneError):
    """The training loss became NaN or infinite."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name closest to ``name``, or ``""``."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
