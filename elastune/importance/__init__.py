"""How much each weight matters: one criterion, one file."""

from elastune.importance.base import InputStatistic, Scores
from elastune.importance.magnitude import magnitude_scores
from elastune.importance.sparsegpt import InputHessian, sparsegpt_prune
from elastune.importance.structure import (
    STRUCTURE_METHODS,
    StructureMethod,
    UnitScores,
    structure_scores,
    units_from_weights,
)
from elastune.importance.wanda import InputNorm, wanda_scores

__all__ = [
    "STRUCTURE_METHODS",
    "InputHessian",
    "InputNorm",
    "InputStatistic",
    "Scores",
    "StructureMethod",
    "UnitScores",
    "magnitude_scores",
    "sparsegpt_prune",
    "structure_scores",
    "units_from_weights",
    "wanda_scores",
]
