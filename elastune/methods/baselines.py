"""Train what a method is compared with."""

from __future__ import annotations

from elastune.run import Run
from elastune.stages import train_baseline


def train_baselines(run: Run) -> None:
    """Train the recipe's baselines that are trained at all, on the method's own batches."""
    for name in run.recipe.baselines:
        if "+" in name:
            train_baseline(run, name)
