"""Save extracted sub-networks so that others can load them; every format proves that it does."""

from __future__ import annotations

from elastune.export.formats import FORMATS
from elastune.export.saved import Saved, save_subnetwork
from elastune.export.snap import snap_to_uniform

__all__ = ["FORMATS", "Saved", "save_subnetwork", "snap_to_uniform"]
