"""How much each weight matters: one criterion, one file."""

from elastune.importance.base import Importance, InputStatistic, Scores, SharedScores
from elastune.importance.fisher import fisher_scores, scores_in_rounds
from elastune.importance.magnitude import magnitude_scores
from elastune.importance.movement import MovementPruning, MovementSettings
from elastune.importance.saved import load_scores, save_scores
from elastune.importance.sparsegpt import InputHessian, sparsegpt_prune
from elastune.importance.structure import (
    STRUCTURE_METHODS,
    StructureMethod,
    UnitScores,
    structure_scores,
    units_from_weights,
)
from elastune.importance.taylor import taylor_scores
from elastune.importance.wanda import InputNorm, wanda_scores

__all__ = [
    "STRUCTURE_METHODS",
    "Importance",
    "InputHessian",
    "InputNorm",
    "InputStatistic",
    "MovementPruning",
    "MovementSettings",
    "Scores",
    "SharedScores",
    "StructureMethod",
    "UnitScores",
    "fisher_scores",
    "load_scores",
    "magnitude_scores",
    "save_scores",
    "scores_in_rounds",
    "sparsegpt_prune",
    "structure_scores",
    "taylor_scores",
    "units_from_weights",
    "wanda_scores",
]
