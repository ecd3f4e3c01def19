"""Plain fine-tuning: the systems that every method is compared with, on their own.

No super-network: each baseline of the recipe is trained on the same batches and scored.
"""

from __future__ import annotations

from elastune.measure import measure
from elastune.methods.baselines import train_baselines
from elastune.run import Run
from elastune.stages import sparsify


def finetune(run: Run) -> None:
    """Train and score the recipe's baselines; stages that are done are skipped."""
    if any(name.startswith("sparse") for name in run.recipe.baselines):
        sparsify(run)
    train_baselines(run)
    measure(run)
