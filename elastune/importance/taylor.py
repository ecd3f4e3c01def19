"""Taylor: score = |W * dL/dW|, the first-order change of the loss when a weight becomes 0.

Source: Molchanov et al. 2019 (equation 5, of single weights and without the square). The gradient
is that of the loss over all batches, so that slopes of opposite sign cancel out; one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from elastune.elastic.linear import can_slice
from elastune.errors import BadData, UnsupportedModel
from elastune.heads import Head
from elastune.importance.base import Scores
from elastune.importance.passes import Batches, Passes, gradients_of
from elastune.linears import is_transposed, weight_of
from elastune.models.families import architecture


def taylor_scores(
    model: PreTrainedModel,
    batches: Batches,
    *,
    head: Head | None = None,
    tokens_per_batch: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Score every weight of the linear layers in a model's blocks.

    The model is not changed. One float32 gradient per scored weight is held, and the activations of
    one batch.

    Args:
        model: of a known architecture, not yet elastic.
        batches: token ids ``(N, L)`` without padding, or batches: as ``head.collate`` makes them
            where a head is given, else the keyword arguments of the model's forward, with labels.
        head: makes the loss of the batches.
        tokens_per_batch: of token ids, in one forward pass.
        progress: called with the number of batches done.

    Returns:
        Name of a weight -> float32 ``(O, I)`` on the CPU, in nats per target where the targets can
        be counted (token ids, or a head), else in units of the losses' sum.

    Raises:
        BadData: there are no batches, or they have no loss that depends on the weights.
        UnsupportedModel: unknown family, or weights that have no gradient (quantised).
    """
    layers = {name: model.get_submodule(name) for name in architecture(model).linear_names(model)}
    for name, layer in layers.items():
        if not can_slice(layer):
            raise UnsupportedModel(
                f"{name} is a {type(layer).__name__}, whose weights have no gradient",
                try_="score the plain model, before adapters are added or it is quantised",
            )
    weights: dict[str, Tensor] = {name: layer.weight for name, layer in layers.items()}  # type: ignore[misc]
    total = _gradients(model, weights, Passes(model, batches, head, tokens_per_batch, progress))
    found: Scores = {}
    for name, layer in layers.items():
        slope = total.pop(name).T if is_transposed(layer) else total.pop(name)
        score = slope.mul_(weight_of(layer).detach()).abs_()
        found[f"{name}.weight"] = score.cpu().contiguous()
    return found


def _gradients(
    model: PreTrainedModel, weights: dict[str, Tensor], passes: Passes
) -> dict[str, Tensor]:
    """Return the gradient of the loss over all batches, float32, shaped like the parameters."""
    total: dict[str, Tensor] = {}

    def gather(name: str) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            # Moved at once: low precision would round sums, and no two copies stay alive.
            assert parameter.grad is not None
            new = parameter.grad.float()
            total[name] = total[name].add_(new) if name in total else new
            parameter.grad = None

        return add

    n_targets = 0
    with gradients_of(model, weights.values()), torch.enable_grad(), ExitStack() as stack:
        for name, weight in weights.items():
            handle = weight.register_post_accumulate_grad_hook(gather(name))
            stack.callback(handle.remove)
        for number, batch in enumerate(passes, 1):
            loss, targets = passes.loss(batch)
            if not bool(loss.isfinite()):
                raise BadData(
                    f"the loss of batch {number} is {float(loss.detach())}",
                    try_="batches with labels, and a model that was not trained astray",
                )
            if loss.requires_grad:
                loss.backward()
            n_targets += targets
    missing = [name for name in weights if name not in total]
    if missing:
        raise BadData(
            f"the loss does not depend on {missing[0]}",
            try_="a head whose loss uses it, or leave it out of the space",
        )
    return {name: gradient.div_(max(n_targets, 1)) for name, gradient in total.items()}
