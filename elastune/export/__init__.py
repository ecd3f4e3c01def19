"""Save extracted sub-networks so that others can load them; every format proves that it does."""

from __future__ import annotations

from elastune.export.compressed import save_compressed
from elastune.export.formats import FORMATS
from elastune.export.registry import EXPORT_FORMATS, check_export, export_model
from elastune.export.result import Checked, Export
from elastune.export.runtimes import RUNTIME_FORMATS
from elastune.export.saved import Saved, save_subnetwork
from elastune.export.snap import snap_to_uniform

__all__ = [
    "EXPORT_FORMATS",
    "FORMATS",
    "RUNTIME_FORMATS",
    "Checked",
    "Export",
    "Saved",
    "check_export",
    "export_model",
    "save_compressed",
    "save_subnetwork",
    "snap_to_uniform",
]
