"""How much each weight matters: one criterion, one file."""

from elastune.importance.base import InputStatistic, Scores
from elastune.importance.magnitude import magnitude_scores
from elastune.importance.sparsegpt import InputHessian, sparsegpt_prune
from elastune.importance.wanda import InputNorm, wanda_scores

__all__ = [
    "InputHessian",
    "InputNorm",
    "InputStatistic",
    "Scores",
    "magnitude_scores",
    "sparsegpt_prune",
    "wanda_scores",
]
