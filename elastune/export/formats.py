"""The formats a sub-network can be saved in, the one with the fewest demands first."""

from __future__ import annotations

from elastune.export.base import Format
from elastune.export.hetero import HETERO
from elastune.export.hf import HF
from elastune.export.padded import PADDED

FORMATS: dict[str, Format] = {format.name: format for format in (HF, PADDED, HETERO)}
