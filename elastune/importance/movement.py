"""Movement pruning: scores learned in a fine-tuning run, what a weight's change did to the loss.

Every structure of a linear layer's weight has a score S, at first 0, that the training moves by
-sum(W * dL/dW'), where W' = W * 1[S > tau] is what the layer uses
(`elastune.importance.scored_linear`). So weights that the training drives away from zero gain
score, and those that it shrinks lose it. With p the progress within the warm-up, 0 to 1:

    tau = tau_start * (1 - p)^3        before: -infinity, after: 0
    penalty = factor * (1 - (1 - p)^3) * mean over layers of [size / 2 * mean(sigmoid(S))]

where ``size`` is the number of weights in a structure, and tau_start the value that masks 0.1 % of
all weights as the warm-up begins. At least 2 % of the structures of each layer are always kept.

Sources: Sanh et al. 2020 (movement pruning), Lagunas et al. 2021 (blocks, rows and columns), Munoz
et al. 2024 (EFTNAS, section 3.1). Deviations from the latter's code: biases are neither masked nor
scored; and scores learn to the end of the training, where it stops at the end of the warm-up
(``freeze=True``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from elastune.config import TrainConfig
from elastune.errors import BadRecipe, nearest
from elastune.importance.base import SharedScores
from elastune.importance.scored_linear import (
    STRUCTURE_KINDS,
    ScoredLinear,
    StructureKind,
    add_scores,
    remove_scores,
)
from elastune.models.families import architecture
from elastune.space import SubnetConfig
from elastune.state import copy_state

_THRESHOLD = "movement.threshold_start"


@dataclass(frozen=True)
class MovementSettings:
    """How scores are learned; defaults as published for EFTNAS.

    Attributes:
        attention: structures of the attention's projections.
        ffn_in: of the projections into the feed-forward's channels (up, gate).
        ffn_out: of the projection out of them (down).
        block_size: edge of the square structures called ``"block"``.
        warmup: parts of the training between which threshold and penalty grow to their full value.
        regularisation: the penalty's factor.
        start_sparsity: part of all weights that is masked as the warm-up begins.
        keep: part of each layer's structures that is never masked.
        score_learning_rate: of the scores; None: that of the weights.
        freeze: scores learn no more after the warm-up; what is left is plain fine-tuning.

    Raises:
        BadRecipe: a value that is out of its range.
    """

    attention: StructureKind = "block"
    ffn_in: StructureKind = "row"
    ffn_out: StructureKind = "column"
    block_size: int = 32
    warmup: tuple[float, float] = (0.2, 0.5)
    regularisation: float = 0.02
    start_sparsity: float = 0.001
    keep: float = 0.02
    score_learning_rate: float | None = None
    freeze: bool = False

    def __post_init__(self) -> None:
        for name in ("attention", "ffn_in", "ffn_out"):
            kind = getattr(self, name)
            if kind not in STRUCTURE_KINDS:
                raise BadRecipe(
                    f"movement: {name}={kind!r}{nearest(str(kind), STRUCTURE_KINDS)}; structures "
                    f"are {', '.join(STRUCTURE_KINDS)}"
                )
        start, end = self.warmup
        if not 0 < start < end <= 1:
            raise BadRecipe(
                f"movement: the warm-up {start} to {end} is not within the training, 0 to 1; it "
                "begins after the first step, when scores have begun to differ"
            )
        ranges: dict[str, tuple[float, float]] = {
            "block_size": (1, math.inf),
            "regularisation": (0, math.inf),
            "start_sparsity": (0, 1),
            "keep": (0, 1),
        }
        for field in fields(self):
            low, high = ranges.get(field.name, (-math.inf, math.inf))
            value = getattr(self, field.name)
            if field.name in ranges and not low <= value <= high:
                raise BadRecipe(f"movement: {field.name}={value} is not within {low} and {high}")
        if self.score_learning_rate is not None and self.score_learning_rate <= 0:
            raise BadRecipe(
                f"movement: score_learning_rate={self.score_learning_rate} is not above 0"
            )


class MovementPruning:
    """Trains a model and the scores of its weights (a `elastune.train.ScheduledTrainee`).

    Args:
        model: changed in place: the linear layers of its blocks get scores and masks. All its
            weights are trained, with or without scores.
        settings: how.

    Raises:
        UnsupportedModel: unknown family, or layers that cannot be masked; the model is as it was.
    """

    space = None

    def __init__(
        self, model: PreTrainedModel, settings: MovementSettings = MovementSettings()
    ) -> None:
        self.model = model
        self.settings = settings
        self.layers: dict[str, ScoredLinear] = {}
        try:
            for name, role in architecture(model).linear_names(model).items():
                kind = _kind_of(role, settings)
                layer = model.get_submodule(name)
                self.layers[name] = add_scores(name, layer, kind, settings.block_size)
        except Exception:
            self.unwrap()
            raise
        model.requires_grad_(True)
        self._threshold_start = torch.tensor(math.nan, dtype=torch.float64)
        self._growth = 0.0
        self.threshold = -math.inf
        """The tau of the current step."""

    def begin_step(self, progress: float) -> None:
        """Make the masks of a step; ``progress`` runs from 0 to 1 over the training."""
        start, end = self.settings.warmup
        self._growth = 0.0 if progress < start else 1 - _cubic((progress - start) / (end - start))
        is_over = self.settings.freeze and progress >= end
        for layer in self.layers.values():
            layer.learns = not is_over
        if progress < start:
            self.threshold = -math.inf
            for layer in self.layers.values():
                layer.mask = None
            return
        if bool(self._threshold_start.isnan()):
            self._threshold_start.fill_(self._quantile(self.settings.start_sparsity))
        # Capped: where all scores are above 0 it would fall.
        self.threshold = min(float(self._threshold_start), 0.0) * (1 - self._growth)
        for layer, mask in self._masks(self.threshold):
            layer.mask = mask.to(layer.weight.dtype)

    def penalty(self) -> Tensor:
        """Return what is added to the loss so that scores tend below the threshold, a scalar."""
        factor = self.settings.regularisation * self._growth
        layers = list(self.layers.values())
        if factor == 0 or not layers or not layers[0].learns:
            return torch.zeros((), device=self.model.device)
        sizes = [math.prod(layer.grid.block) / 2 for layer in layers]
        means = [layer.movement_scores.sigmoid().mean() for layer in layers]
        # Summed where the first layer is, of models that are spread over several devices.
        home = means[0].device
        terms = [size * mean.to(home) for size, mean in zip(sizes, means, strict=True)]
        return torch.stack(terms).mean() * factor

    def scores(self) -> SharedScores:
        """Return the scores by the weights' names, float32 ``(O, I)`` on the CPU."""
        found = {
            f"{name}.weight": layer.grid.expand(layer.movement_scores.detach().cpu().clone())
            for name, layer in self.layers.items()
        }
        return SharedScores(
            found, {f"{name}.weight": layer.grid.block for name, layer in self.layers.items()}
        )

    def masks(self) -> dict[str, Tensor]:
        """Return what the threshold keeps at present, by the weights' names: bool ``(O, I)``."""
        masks = [mask for _, mask in self._masks(self.threshold)]
        return {
            f"{name}.weight": layer.grid.expand(mask.cpu())
            for (name, layer), mask in zip(self.layers.items(), masks, strict=True)
        }

    def unwrap(self) -> PreTrainedModel:
        """Make the layers plain again, with their unmasked weights; return the model."""
        for layer in self.layers.values():
            remove_scores(layer)
        self.layers = {}
        return self.model

    def parameter_groups(self, cfg: TrainConfig) -> list[dict[str, Any]]:
        """Return the scores as a group of their own: without weight decay, at their own rate."""
        scores = [layer.movement_scores for layer in self.layers.values()]
        group: dict[str, Any] = {"params": scores, "weight_decay": 0.0}
        if self.settings.score_learning_rate is not None:
            group["lr"] = self.settings.score_learning_rate
        return [group]

    def activate(self, config: SubnetConfig) -> None:
        """Do nothing: there is one network."""

    def trained_state(self) -> dict[str, Tensor]:
        """Return every weight and score by name, tied ones once, and where the threshold began."""
        state = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        return {**state, _THRESHOLD: self._threshold_start}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Copy in what `trained_state` returned.

        Raises:
            BadArtifact: names or shapes differ; nothing is copied.
        """
        copy_state(state, self.trained_state(), "this model with scores")

    @torch.no_grad()
    def _masks(self, threshold: float) -> Iterator[tuple[ScoredLinear, Tensor]]:
        """Yield the layers with their masks, bool ``(R, C)``."""
        layers = list(self.layers.values())
        masks = [layer.movement_scores > threshold for layer in layers]
        # Counted in one go: asking a GPU for each would wait for it each time.
        counts = [mask.sum().to(self.model.device) for mask in masks]
        kept = torch.stack(counts).tolist() if counts else []
        for layer, mask, count in zip(layers, masks, kept, strict=True):
            least = math.ceil(mask.numel() * self.settings.keep - 1e-9)
            if count < least:
                flat = layer.movement_scores.flatten()
                mask = layer.movement_scores >= flat.topk(least).values[-1]
            yield layer, mask

    @torch.no_grad()
    def _quantile(self, part: float) -> float:
        """Return the least score with which at least ``part`` of the weights is not above it."""
        layers = self.layers.values()
        scores = torch.cat([layer.movement_scores.flatten().cpu() for layer in layers])
        weights = torch.cat([layer.grid.counts().flatten() for layer in layers])
        order = scores.argsort()
        below = weights[order].cumsum(0)
        at = torch.searchsorted(below, int(int(below[-1]) * part) + 1)
        return float(scores[order[min(int(at), len(order) - 1)]])


def _kind_of(role: str, settings: MovementSettings) -> StructureKind:
    if role in ("up", "gate", "gate_up"):
        return settings.ffn_in
    return settings.ffn_out if role == "down" else settings.attention


def _cubic(done: float) -> float:
    """Return what is left at a part of the warm-up: (1 - done)^3, 0 after it."""
    return (1 - min(done, 1.0)) ** 3
