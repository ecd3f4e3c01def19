"""LoRAs that were trained elsewhere: read, ordered by what their ranks add, elastic, cut."""

from elastune.adapters.cut import CutAdapter, cut_adapter
from elastune.adapters.energies import AdapterEnergies, ModuleEnergies
from elastune.adapters.from_adapter import from_adapter
from elastune.adapters.peft_folder import PeftLora, read_adapter

__all__ = [
    "AdapterEnergies",
    "CutAdapter",
    "ModuleEnergies",
    "PeftLora",
    "cut_adapter",
    "from_adapter",
    "read_adapter",
]
