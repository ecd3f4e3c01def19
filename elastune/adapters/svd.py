"""Order the ranks of a low-rank product by what they add.

The product ``B A`` is never formed: all decompositions are of factors and of ``(r, r)`` matrices,
in float64.

Shapes: `I` in features, `O` out features, `r` rank, `k` ranks that are left.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-7
"""Singular values below this part of the largest are rounding, and left out."""
_DAMPING = 1e-6


def svd_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return A' ``(k, I)`` and B' ``(O, k)`` of the same product, and its singular values ``(k,)``.

    ``B A = U S V^T`` by QR of both factors and an SVD of ``(r, r)``; ``A' = S^1/2 V^T``,
    ``B' = U S^1/2``. The first ``n`` rows and columns are the best approximation of rank n in the
    Frobenius norm (Eckart and Young, 1936). ``k`` is 0 for a product of zeros.

    Args:
        a: ``(r, I)``.
        b: ``(O, r)``.
    """
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, values, vt = torch.linalg.svd(rb @ ra.T)
    k = int((values > ROUNDING * values[0]).sum())
    values = values[:k]
    root = values.sqrt()
    return root[:, None] * (vt[:k] @ qa.T), (qb @ u[:, :k]) * root, values


def order_by_outputs(a: Tensor, b: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return A', B' and values ordered by the outputs on given inputs, not by the weights.

    With inputs x of second moment ``C = E[x x^T]``, the first n ranks are the best approximation of
    ``B A C^1/2``: the least mean squared error of ``B A x`` among all products of rank n
    (whitened as in SVD-LLM, Wang et al. 2024). Only the second moment of ``A x`` is needed, since
    ``B A C^1/2`` has the left singular vectors of ``B G^1/2``, ``G = A C A^T``. The values are the
    singular values of ``B A C^1/2``: the sum of their squares is ``E ||B A x||^2``.

    Args:
        a: ``(k, I)``, of full rank, as from `svd_factors`.
        b: ``(O, k)``, of full rank.
        gram: ``E[(A x)(A x)^T]``, ``(k, k)``.
    """
    a, b, gram = a.double(), b.double(), gram.double()
    # A little of C = identity: directions that no input has would else be divided by zero.
    plain = a @ a.T
    gram = gram + _DAMPING * (gram.trace() / plain.trace()) * plain
    q, r = torch.linalg.qr(b)
    u, values, _ = torch.linalg.svd(r @ torch.linalg.cholesky(gram))
    root = values.sqrt()
    return (u.T @ r @ a) / root[:, None], (q @ u) * root, values
