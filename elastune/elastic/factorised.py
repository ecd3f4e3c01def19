"""An embedding of low rank: short rows, and one projection to the width of the model.

This file imports nothing of elastune: exported models carry a copy of it.
"""

from __future__ import annotations

from torch import Tensor, nn


class FactorisedEmbedding(nn.Module):
    """Look up ``r`` numbers a token, then project them to ``D``.

    Source: Lan et al. 2020 (ALBERT, section 3.1). It has ``V r + r D`` weights in place of ``V D``.

    Args:
        num_embeddings: ``V``.
        rank: ``r``.
        embedding_dim: ``D``.
        padding_idx: its row gets no gradient.
    """

    def __init__(
        self, num_embeddings: int, rank: int, embedding_dim: int, padding_idx: int | None = None
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.rows = nn.Embedding(num_embeddings, rank, padding_idx)
        self.projection = nn.Linear(rank, embedding_dim, bias=False)

    @property
    def rank(self) -> int:
        """``r``."""
        return int(self.rows.weight.shape[1])

    @property
    def weight(self) -> Tensor:
        """The product, ``(V, D)``: what a stock embedding of the same function holds."""
        return self.rows.weight @ self.projection.weight.T

    def forward(self, input_ids: Tensor) -> Tensor:
        """Args: input_ids: ``(...)``.  Returns: ``(..., D)``."""
        found: Tensor = self.projection(self.rows(input_ids))
        return found
