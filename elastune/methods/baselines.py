"""Train what a method is compared with."""

from __future__ import annotations

from elastune.run import Run


def train_baselines(run: Run) -> None:
    """Train the recipe's baselines that are trained at all, on the method's own batches."""
    for name in run.recipe.baselines:
        if "+" in name:
            run.train_baseline(name)
