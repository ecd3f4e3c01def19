"""Losses of the labelled positions of a packed batch, and of a student beside its teacher.

Shapes: `N` labelled positions, `D` model, `V` vocabulary (or classes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastune.data import IGNORED_LABEL, PackedBatch
from elastune.errors import BadRecipe
from elastune.models import architecture
from elastune.packing import padded_rows, reads_packed_rows, supports_packed_attention

_CHUNK_ELEMENTS = 2**23
"""Logits held at once, about 32 MB in float32."""


@dataclass(frozen=True, eq=False)
class LazyLogits:
    """The ``(N, V)`` logits of a frozen linear head, made a few rows at a time when asked for.

    Attributes:
        hidden: ``(N, D)``, what the head reads.
        weight: ``(V, D)``; gets no gradient.
        bias: ``(V,)`` or None; gets no gradient.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """Return ``(N, V)``."""
        return self.hidden.shape[0], self.weight.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        return nn.functional.linear(self.hidden[rows], self.weight, self.bias)

    def detach(self) -> LazyLogits:
        """Return the same logits cut off from what made them."""
        return LazyLogits(self.hidden.detach(), self.weight, self.bias)


Logits = Tensor | LazyLogits


class _HeadCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of ``hidden @ weight.T``, chunk by chunk, for a frozen head.

    The gradient with respect to the hidden states is made with each chunk's logits, which are then
    forgotten: the ``(N, V)`` logits, two thirds of a small model's training memory, never exist.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> Tensor:
        chunk = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        total = hidden.new_zeros((), dtype=torch.float32)
        needs_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if needs_grad else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = nn.functional.linear(hidden[rows], weight, bias).float()
            target = labels[rows, None]
            log_sum = logits.logsumexp(dim=-1, keepdim=True)
            total += (log_sum - logits.gather(1, target)).sum()
            if grad is not None:
                probabilities = logits.sub_(log_sum).exp_()
                probabilities.scatter_add_(
                    1, target, torch.full_like(target, -1, dtype=probabilities.dtype)
                )
                grad[rows] = probabilities.to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * grads[0]).to(grad.dtype), None, None, None


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Return the summed cross entropy of a frozen linear head, without keeping its logits.

    Args:
        hidden: ``(N, D)``.
        weight: ``(V, D)``; gets no gradient.
        bias: ``(V,)`` or None; gets no gradient.
        labels: int64 ``(N,)``.
    """
    return _HeadCrossEntropy.apply(hidden, weight, bias, labels)  # type: ignore[no-any-return]


class _HeadDistillation(torch.autograd.Function):
    """Summed T^2 KL(teacher || student), chunk by chunk, for a student with a frozen head.

    As in `_HeadCrossEntropy`, neither the student's nor a lazy teacher's logits are ever whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Logits,
        temperature: float,
    ) -> Tensor:
        chunk = max(1, _CHUNK_ELEMENTS // (2 * weight.shape[0]))  # two networks' logits at once
        total = hidden.new_zeros((), dtype=torch.float32)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = nn.functional.linear(hidden[rows], weight, bias)
            loss, slope = _divergence(logits, teacher[rows], temperature)
            total += loss
            if grad is not None:
                grad[rows] = slope.to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * grads[0]).to(grad.dtype), None, None, None, None


class _Distillation(torch.autograd.Function):
    """Summed T^2 KL(teacher || student) of whole logits; keeps the gradient and nothing else."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        loss, slope = _divergence(logits, teacher, temperature)
        ctx.save_for_backward(slope.to(logits.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * grads[0]).to(slope.dtype), None, None


def _divergence(logits: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the summed T^2 KL of ``(n, V)`` logits, and its gradient: T (p - teacher's p)."""
    own = (logits.float() / temperature).log_softmax(dim=-1)
    target = (teacher.float() / temperature).log_softmax(dim=-1)
    wanted = target.exp()
    # What neither thinks possible (padding) adds nothing, though its logarithms differ by NaN.
    gap = target.sub_(own).masked_fill_(wanted == 0, 0.0)
    loss = gap.mul_(wanted).sum() * temperature**2
    return loss, own.exp_().sub_(wanted).mul_(temperature)


def distillation_loss(student: Logits, teacher: Logits, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(teacher || student) summed over rows, both softened by the temperature T.

    Source: Hinton et al. 2015; the factor keeps gradients of one size whatever T is.

    Args:
        student: ``(N, V)``; lazy ones are never made whole.
        teacher: ``(N, V)``; gets no gradient. May be minus infinity where nothing can be, as the
            student then is, too.
        temperature: above 0.

    Raises:
        BadRecipe: the two differ in shape.
    """
    if tuple(student.shape) != tuple(teacher.shape):
        raise BadRecipe(
            f"the teacher tells {teacher.shape[-1]} classes or tokens apart at {teacher.shape[0]} "
            f"places, the student {student.shape[-1]} at {student.shape[0]}",
            try_="a teacher with the student's own tokenizer and labels",
        )
    teacher = teacher.detach()
    if isinstance(student, LazyLogits):
        return _HeadDistillation.apply(  # type: ignore[no-any-return]
            student.hidden, student.weight, student.bias, teacher, temperature
        )
    return _Distillation.apply(student, teacher[:], temperature)  # type: ignore[no-any-return]


def logits_loss(logits: Logits, labels: Tensor) -> Tensor:
    """Return the summed cross entropy of ``(N, V)`` logits, int64 labels ``(N,)``."""
    if isinstance(logits, LazyLogits):
        return head_loss(logits.hidden, logits.weight, logits.bias, labels)
    return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def labels_of(batch: PackedBatch) -> Tensor:
    """Return the labels there are, int64 ``(N,)``."""
    return batch.labels[0, _labelled(batch)]


def _labelled(batch: PackedBatch) -> Tensor:
    return (batch.labels[0] != IGNORED_LABEL).nonzero()[:, 0]


def completion_loss(model: PreTrainedModel, batch: PackedBatch) -> tuple[Tensor, int]:
    """Return the summed cross entropy over the labelled positions, and their number.

    Logits are computed at labelled positions alone. Call it inside `packing.packed_attention`.
    """
    labels = labels_of(batch)
    return logits_loss(completion_logits(model, batch), labels), len(labels)


def completion_logits(model: PreTrainedModel, batch: PackedBatch) -> Logits:
    """Return the ``(N, V)`` logits of the labelled positions; lazy ones of a frozen linear head.

    Call it inside `packing.packed_attention`.
    """
    positions = _labelled(batch)
    if not reads_packed_rows(model):
        return _padded_logits(model, batch, positions)
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.positions,
        "use_cache": False,
    }
    if supports_packed_attention(model):
        inputs["sequence_starts"] = tuple(batch.starts.tolist())
    if _has_frozen_head(model):
        return _lazy(model, model.base_model(**inputs).last_hidden_state[0, positions])
    return model(**inputs, logits_to_keep=positions).logits[0]  # type: ignore[no-any-return]


def _padded_logits(model: PreTrainedModel, batch: PackedBatch, positions: Tensor) -> Logits:
    """Return the logits of a model that cannot keep the sequences of one row apart."""
    ids, mask, places = padded_rows(batch.input_ids, batch.starts)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if _has_frozen_head(model):
        hidden = model.base_model(**inputs).last_hidden_state
        return _lazy(model, hidden.flatten(0, 1)[places[positions]])
    return model(**inputs).logits.flatten(0, 1)[places[positions]]  # type: ignore[no-any-return]


def _has_frozen_head(model: PreTrainedModel) -> bool:
    """Tell whether logits are a matrix product with weights that get no gradient."""
    head = model.get_output_embeddings()
    return architecture(model).plain_head and not any(p.requires_grad for p in head.parameters())


def _lazy(model: PreTrainedModel, hidden: Tensor) -> LazyLogits:
    head = model.get_output_embeddings()
    return LazyLogits(hidden, head.weight, getattr(head, "bias", None))
