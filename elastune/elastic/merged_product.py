"""The product with a merged weight, whose gradient reaches the adapter alone.

The gradient of a whole weight costs as much as the product itself, which makes masked adapters
slow to train (+45 % a step in the reference code). Here it is estimated from a part of the tokens:
those with the largest |gradient| |input| are the likeliest, each is weighted by one over its
probability, so that the mean of the estimate is the gradient (column-row sampling: Drineas et al.
2006; Adelman et al. 2021). What runs forward and what flows back to the inputs is exact.

Shapes: `T` tokens, `I` in features, `O` out features, `r` active rank, `k` sampled tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from elastune.elastic.merge_rules import MergeRule


class MergedProduct(torch.autograd.Function):
    """x rule(W, s B A)^T + b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        rule: MergeRule,
        token_share: float,
    ) -> Tensor:
        merged = rule.merge(weight, product(a, b, scale)).to(x.dtype)
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale, ctx.rule, ctx.token_share = scale, rule, token_share
        return nn.functional.linear(x, merged, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        grad = grads[0].reshape(-1, weight.shape[0])
        # Made again: kept, it would take the memory of a second model.
        merged, passes = ctx.rule.merge_and_pass(weight, product(a, b, ctx.scale))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ merged.to(grad.dtype)).view(x.shape)
        count = math.ceil(ctx.token_share * len(flat))
        if count < len(flat):
            weights = torch.linalg.vector_norm(grad, dim=1, dtype=torch.float32)
            weights *= torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32)
            index, factors = sample_rows(weights, count)
            flat = flat[index]
            grad = grad[index] * factors.to(grad.dtype)[:, None]
        whole = (grad.T @ flat).to(a.dtype).mul_(passes)
        grad_a = (b.T @ whole).mul_(ctx.scale)
        grad_b = (whole @ a.T).mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None, None, None


def product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return s B A ``(O, I)`` in float32."""
    return (b.float() @ a.float()).mul_(scale)


def sample_rows(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw rows for a sum over all rows, each with a probability that grows with its weight.

    Systematic sampling: exactly ``count`` rows where as many have a weight, none of them twice.

    Args:
        weights: not negative, ``(T,)``.
        count: how many rows, below T.

    Returns:
        Rows ``(k,)`` and what to multiply each by: one over its probability, or 0.
    """
    probability = _inclusion(weights.double(), count)
    reached = probability.cumsum(0)
    start = torch.rand((), device=weights.device, dtype=torch.float64)
    points = start + torch.arange(count, device=weights.device)
    index = torch.searchsorted(reached, points, right=True)
    is_row = index < len(weights)
    index = index.clamp_(max=len(weights) - 1)
    found = probability[index]
    return index, torch.where(is_row & (found > 0), 1 / found, 0).float()


def _inclusion(weights: Tensor, count: int) -> Tensor:
    """Return min(1, c w) with the c that lets them add up to ``count``."""
    descending = weights.sort(descending=True).values
    rest = descending.flip(0).cumsum(0).flip(0)  # of this row and all behind it
    certain = torch.arange(count, device=weights.device)
    factors = (count - certain) / rest[:count].clamp_min(torch.finfo(rest.dtype).tiny)
    # The first number of certain rows at which no other row would be more than certain.
    fits = factors * descending[:count] <= 1
    fits[-1] = True
    factor = factors[fits.int().argmax()]
    return (weights * factor).clamp_(max=1)
