"""Load models and tokenizers, and know where each family keeps its parts."""

from __future__ import annotations

from elastune.models.architecture import ARCHITECTURES, Architecture, architecture

__all__ = ["ARCHITECTURES", "Architecture", "architecture"]
