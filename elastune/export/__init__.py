"""Save extracted sub-networks so that others can load them; every format proves that it does."""

from __future__ import annotations

from elastune.export.formats import FORMATS
from elastune.export.runtimes import RUNTIME_FORMATS, RuntimeExport, check_export, export_model
from elastune.export.saved import Saved, save_subnetwork
from elastune.export.snap import snap_to_uniform

__all__ = [
    "FORMATS",
    "RUNTIME_FORMATS",
    "RuntimeExport",
    "Saved",
    "check_export",
    "export_model",
    "save_subnetwork",
    "snap_to_uniform",
]
