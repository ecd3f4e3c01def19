"""The loss of one network on one batch, alone or beside its teacher."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from elastune.config import DistillConfig
from elastune.features import Features, feature_hooks, hidden_loss, relation_loss
from elastune.heads import Head, Outputs, SoftTargets


class TrainStep(nn.Module):
    """What data parallelism wraps: batch in, summed loss out, by one forward call.

    Args:
        model: whose active sub-network runs.
        head: computes the loss.
        distill: how it is weighted against what a teacher says; None without any teacher.
    """

    def __init__(self, model: PreTrainedModel, head: Head, distill: DistillConfig | None) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.distill = distill
        self.hooks = None if distill is None else feature_hooks(model, distill)

    def forward(
        self, batch: dict[str, Any], targets: SoftTargets | None = None
    ) -> tuple[Tensor, SoftTargets | None]:
        """Return the loss of the active sub-network, and the teacher's part for those that follow.

        Args:
            batch: made by ``head.collate``.
            targets: of the teacher; without them what is active learns from its labels, and
                teaches the others.
        """
        cfg, head = self.distill, self.head
        if cfg is None:
            return head.loss(self.model, batch), None
        outputs, features = self._run(batch)
        if targets is None:
            detached = tuple(output.detach() for output in outputs)
            taught = None if features is None else features.detach()
            return head.loss_of(outputs, batch), SoftTargets(detached, taught)
        loss = cfg.weight * head.distillation_loss(outputs, targets.outputs, batch, cfg.temperature)
        if cfg.weight < 1:
            loss = loss + (1 - cfg.weight) * head.loss_of(outputs, batch)
        if features is not None and targets.features is not None:
            loss = self._add_features(loss, features, targets.features, batch)
        return loss, targets

    def _run(self, batch: dict[str, Any]) -> tuple[Outputs, Features | None]:
        if self.hooks is None:
            return self.head.outputs(self.model, batch), None
        with self.hooks.capture() as seen:
            outputs = self.head.outputs(self.model, batch)
        return outputs, self.hooks.features(seen)

    def _add_features(
        self, loss: Tensor, own: Features, teacher: Features, batch: dict[str, Any]
    ) -> Tensor:
        assert self.distill is not None
        assert self.hooks is not None
        sequences = self.head.sequences(batch)
        if self.distill.hidden > 0:
            loss = loss + self.distill.hidden * hidden_loss(own, teacher, sequences)
        if self.distill.relations > 0:
            relations = relation_loss(own, teacher, sequences, causal=self.hooks.causal)
            if relations is not None:
                loss = loss + self.distill.relations * relations
        return loss
