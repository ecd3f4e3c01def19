"""Published methods: each a straight line of stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from elastune.methods.eftnas import eftnas
from elastune.methods.finetune import finetune
from elastune.methods.lonas import lonas
from elastune.methods.shears import shears
from elastune.methods.sqft import sqft
from elastune.run import Run

METHODS: Mapping[str, Callable[[Run], None]] = {
    "eftnas": eftnas,
    "finetune": finetune,
    "lonas": lonas,
    "shears": shears,
    "sqft": sqft,
}

__all__ = ["METHODS", "eftnas", "finetune", "lonas", "shears", "sqft"]
