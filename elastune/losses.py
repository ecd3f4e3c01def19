"""Losses of the labelled positions of a packed batch.

Shapes: `N` labelled positions, `D` model, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastune.data import IGNORED_LABEL, PackedBatch
from elastune.models import architecture
from elastune.packing import supports_packed_attention

_CHUNK_ELEMENTS = 2**23
"""Logits held at once, about 32 MB in float32."""


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


def completion_loss(model: PreTrainedModel, batch: PackedBatch) -> tuple[Tensor, int]:
    """Return the summed cross entropy over the labelled positions, and their number.

    Logits are computed at labelled positions alone. Call it inside `packing.packed_attention`.
    """
    positions = (batch.labels[0] != IGNORED_LABEL).nonzero()[:, 0]
    labels = batch.labels[0, positions]
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.positions,
        "use_cache": False,
    }
    if supports_packed_attention(model):
        inputs["sequence_starts"] = tuple(batch.starts.tolist())
    head = model.get_output_embeddings()
    if architecture(model).plain_head and not any(p.requires_grad for p in head.parameters()):
        hidden = model.base_model(**inputs).last_hidden_state[0, positions]
        bias = getattr(head, "bias", None)
        loss = head_loss(hidden, head.weight, bias, labels)
    else:
        logits = model(**inputs, logits_to_keep=positions).logits[0]
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    return loss, len(labels)
