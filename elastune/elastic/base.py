"""The contract of elastic modules."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class ElasticModule(Protocol):
    """A torch module whose active size can be set from outside, and only from outside.

    ``set_active`` is the one mutation: forward, training mode and reading attributes never change
    what is active, so a recomputed forward (gradient checkpointing) sees the same sub-network.
    """

    def set_active(self, size: int) -> None:
        """Use the first ``size`` of what the module has; a whole number in range."""
