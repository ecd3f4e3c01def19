"""Movement pruning from end to end: train a model and its scores, hand over the scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from elastune.config import TrainConfig
from elastune.heads import HEADS, Head
from elastune.importance import MovementPruning, MovementSettings, Scores
from elastune.sampling import FixedSampler
from elastune.step_log import Progress
from elastune.train import train


def movement_scores(
    model: PreTrainedModel,
    items: Sequence[Any],
    cfg: TrainConfig,
    *,
    folder: Path,
    head: Head = HEADS["causal-lm"],
    movement: MovementSettings | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Fine-tune a model and learn the scores of the weights in its blocks on the way.

    A run that was killed goes on from its last checkpoint in ``folder``.

    Args:
        model: changed in place: it ends as a plain model with the weights that were trained,
            none of them masked, in evaluation mode.
        items: what ``head.encode`` made of the examples.
        cfg: of the training; its learning rate is that of all weights.
        folder: gets what `elastune.train.train` leaves.
        head: reads the items and computes the loss.
        movement: how scores are learned; by default as published.
        progress: called after each step.

    Returns:
        Name of a weight -> float32 ``(O, I)``; the threshold that they were learned for is 0.
        Rows and columns with one score are views that take no memory.

    Raises:
        TrainingDiverged: the loss became NaN or infinite.
        UnsupportedModel: unknown family, or layers that cannot be masked.
    """
    net = MovementPruning(model, movement or MovementSettings())
    try:
        train(net, items, FixedSampler(), cfg, folder=folder, head=head, progress=progress)
        return net.scores()
    finally:
        net.unwrap()
