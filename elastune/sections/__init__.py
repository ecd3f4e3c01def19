"""The sections of a recipe. Defaults are the published settings where there are some."""

from elastune.sections.base import Section, listed
from elastune.sections.data import (
    CalibrationConfig,
    DataConfig,
    EvaluateConfig,
    Task,
    TaskConfig,
)
from elastune.sections.search import SearchConfig
from elastune.sections.structure import (
    GenerateConfig,
    ImportanceConfig,
    MovementConfig,
    SparsifyConfig,
    StructureConfig,
)
from elastune.sections.train import (
    AdapterConfig,
    DistillConfig,
    Quantise,
    QuantiseConfig,
    TrainConfig,
)

__all__ = [
    "AdapterConfig",
    "CalibrationConfig",
    "DataConfig",
    "DistillConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "ImportanceConfig",
    "MovementConfig",
    "Quantise",
    "QuantiseConfig",
    "SearchConfig",
    "Section",
    "SparsifyConfig",
    "StructureConfig",
    "Task",
    "TaskConfig",
    "TrainConfig",
    "listed",
]
