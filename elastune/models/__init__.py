"""Load models and tokenizers, and know where each family keeps its parts."""

from __future__ import annotations

from elastune.models.architecture import Architecture
from elastune.models.families import ARCHITECTURES, architecture
from elastune.models.load import load_model
from elastune.models.save import save_model, write_model

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "architecture",
    "load_model",
    "save_model",
    "write_model",
]
