"""SparseGPT: prune column by column and let the remaining columns make up for it.

Source: Frantar and Alistarh 2023, algorithm 1. The inverse Hessian's Cholesky factor gives both
the score w^2 / [H^-1]_jj^2 and the update of the columns to the right. Blocks of columns choose
their masks together; as in the paper a whole block shares one threshold, here per row so that rows
keep equal sparsity, as with Wanda.

Shapes: `O` out features, `I` in features, `K` columns of a block.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from elastune.importance.base import zeros_per_row

_BLOCK_COLUMNS = 128
_DAMPING = 0.01
"""Share of the Hessian's mean diagonal added to it, as in the paper's code."""


class InputHessian:
    """The Hessian X^T X of the layer-wise squared error, ``(I, I)``, float32."""

    def __init__(self) -> None:
        self.hessian: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take in a batch of inputs, ``(tokens, I)``."""
        x = x.float()
        product = x.T @ x
        self.hessian = product if self.hessian is None else self.hessian.add_(product)

    @cached_property
    def inverse_factor(self) -> tuple[Tensor, Tensor]:
        """The upper Cholesky factor of the damped inverse Hessian, and the dead features.

        Features that no calibration token ever used have no say; their weights can go for free.
        Projections that read the same input share it.
        """
        if self.hessian is None:
            raise RuntimeError("no calibration input was seen")
        hessian = self.hessian.clone()
        diagonal = hessian.diagonal()
        dead = diagonal == 0
        diagonal[dead] = 1.0
        diagonal += _DAMPING * diagonal.mean()
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        return torch.linalg.cholesky(inverse, upper=True), dead


def sparsegpt_prune(
    weight: Tensor, inputs: InputHessian, *, ratio: float, n_of_m: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """Prune a weight and update what is left of it.

    Args:
        weight: ``(O, I)``.
        inputs: the Hessian of the weight's inputs.
        ratio: share of zeros in each row.
        n_of_m: (n, m): zero n of each m consecutive weights of a row, instead of ``ratio``; m must
            divide I.

    Returns:
        The new weight, float32 ``(O, I)``, and the mask of kept weights, bool ``(O, I)``.
    """
    factor, dead = inputs.inverse_factor
    w = weight.detach().float().clone()
    w[:, dead] = 0
    kept = torch.ones_like(w, dtype=torch.bool)
    n_columns = w.shape[1]
    # A group of m never straddles two blocks.
    width = _BLOCK_COLUMNS if n_of_m is None else max(_BLOCK_COLUMNS // n_of_m[1], 1) * n_of_m[1]
    for start in range(0, n_columns, width):
        stop = min(start + width, n_columns)
        u = factor[start:stop, start:stop]
        block = w[:, start:stop]
        mask = kept[:, start:stop]
        if n_of_m is None:
            n_zeros = zeros_per_row(stop, ratio) - zeros_per_row(start, ratio)
            _drop_smallest(mask, block, u, n_zeros)
        errors = torch.zeros_like(block)
        for j in range(stop - start):
            if n_of_m is not None and (start + j) % n_of_m[1] == 0:
                group = slice(j, j + n_of_m[1])
                _drop_smallest(mask[:, group], block[:, group], u[group, group], n_of_m[0])
            error = torch.where(mask[:, j], 0.0, block[:, j] / u[j, j])
            block[:, j:] -= error[:, None] * u[j, None, j:]
            errors[:, j] = error
        block.masked_fill_(~mask, 0.0)
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return w, kept


def _drop_smallest(mask: Tensor, block: Tensor, u: Tensor, n_zeros: int) -> None:
    """Clear the ``n_zeros`` entries of each row of ``mask`` whose removal costs least."""
    if n_zeros == 0:
        return
    cost = (block / u.diagonal()).square()
    smallest = cost.topk(n_zeros, dim=1, largest=False).indices
    mask.scatter_(1, smallest, False)
