"""Elastic embedding: the stock table of ``V x D``, or a product of rank ``r`` in its place.

The product is ``A[:, :r] B[:r]``, with ``A = W Q`` and ``B = Q^T``, ``Q`` the right singular
vectors of the table ``W``, the strongest first: before any training, every prefix is the closest
table of its rank (Eckart and Young 1936), and smaller ranks share the factors of larger ones.
`ElasticEmbedding.fit_` makes it the closest where a task's frequent tokens weigh more; real tables,
whose singular values fall slowly, need it.

Shapes: `V` tokens in the vocabulary, `D` width, `R` largest rank below `D`, `r` active rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import PreTrainedModel

from elastune.elastic.factorised import FactorisedEmbedding
from elastune.errors import BadData, InvalidSpace


class ElasticEmbedding(nn.Embedding):
    """An `nn.Embedding` that can be replaced by a product of low rank.

    Attributes:
        weight: the stock table, ``(V, D)``; used at the full size alone.
        factor_a: ``(V, R)``, and ``factor_b``: ``(R, D)``; trained apart from the table.
        active_rank: ``D`` for the stock table.
    """

    factor_a: nn.Parameter
    factor_b: nn.Parameter
    active_rank: int

    def set_active(self, rank: int) -> None:
        """Use rank ``rank``; ``D`` is the stock table."""
        self.active_rank = rank

    @property
    def is_full(self) -> bool:
        """Whether the stock table is active."""
        return self.active_rank == self.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        """Args: input: ids, ``(...)``.  Returns: ``(..., D)``."""
        if self.is_full:
            return super().forward(input)
        rank = self.active_rank
        rows = embedding(input, self.factor_a[:, :rank], self.padding_idx)
        return rows @ self.factor_b[:rank]

    @torch.no_grad()
    def fit_(self, counts: Tensor) -> None:
        """Make the factors anew from the table, each token weighing its occurrences plus one.

        Every prefix is then the table of its rank of the least squared error a token of a text, in
        place of a row of the table. Before training; the table itself stays.

        Args:
            counts: ``(V,)``, such as `token_counts` of the training texts.

        Raises:
            BadData: another number of tokens, or a negative count.
        """
        if counts.shape != (self.num_embeddings,) or bool((counts < 0).any()):
            raise BadData(
                f"counts of shape {tuple(counts.shape)} for {self.num_embeddings} tokens; they "
                "must be one for each, and not negative",
                try_="token_counts(ids, len(table.weight)) with the model's own tokenizer",
            )
        a, b = _factors(self.weight, self.factor_a.shape[1], counts)
        self.factor_a.copy_(a)
        self.factor_b.copy_(b)

    @torch.no_grad()
    def extract(self) -> nn.Embedding | FactorisedEmbedding:
        """Return a module of its own, no weight shared, that computes what is active."""
        rank, (n_tokens, width) = self.active_rank, self.weight.shape
        # Without memory at first: it is given its weights below.
        with torch.device("meta"):
            made: nn.Embedding | FactorisedEmbedding
            if self.is_full:
                made = nn.Embedding(n_tokens, width, self.padding_idx)
            else:
                made = FactorisedEmbedding(n_tokens, rank, width, self.padding_idx)
        if isinstance(made, FactorisedEmbedding):
            made.rows.weight = _copy(self.factor_a[:, :rank])
            made.projection.weight = _copy(self.factor_b[:rank].T)
        else:
            made.weight = _copy(self.weight)
        return made


def _copy(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format))


def token_counts(rows: Iterable[Sequence[int]], n_tokens: int) -> Tensor:
    """Count how often each token occurs.

    Args:
        rows: token ids of the training texts, special tokens included.
        n_tokens: ``V``.

    Returns:
        ``(V,)``, int64.

    Raises:
        BadData: an id that is not below ``V``.
    """
    counts = torch.zeros(n_tokens, dtype=torch.int64)
    for row in rows:
        found = torch.bincount(torch.as_tensor(row, dtype=torch.int64), minlength=n_tokens)
        if len(found) > n_tokens:
            raise BadData(f"token id {len(found) - 1} is outside the model's 0 to {n_tokens - 1}")
        counts += found
    return counts


def input_embedding(model: PreTrainedModel) -> tuple[str, nn.Embedding]:
    """Return the name and module of a model's word embedding, if it can be factorised.

    Raises:
        InvalidSpace: it cannot: no plain table, or one that the output head shares.
    """
    found = model.get_input_embeddings()
    kind = type(model).__name__
    if isinstance(found, FactorisedEmbedding):
        raise InvalidSpace(
            f"embedding: that of this {kind} has rank {found.rank} already",
            try_="leave embedding out",
        )
    if isinstance(found, ElasticEmbedding):
        raise InvalidSpace("the model is elastic already", try_="unwrap() its super-network first")
    is_plain = isinstance(found, nn.Embedding) and type(found).forward is nn.Embedding.forward
    if not is_plain or found.max_norm is not None:  # type: ignore[union-attr]
        raise InvalidSpace(
            f"embedding: that of a {kind} is no plain table of tokens ({type(found).__name__})",
            try_="leave embedding out",
        )
    assert isinstance(found, nn.Embedding)
    head = model.get_output_embeddings()
    if head is not None and head.weight is found.weight:
        raise InvalidSpace(
            f"embedding: the output head of a {kind} is tied to it, and would lose its rank, too",
            try_="trim_vocabulary_, or a model whose head is not tied",
        )
    return next(name for name, module in model.named_modules() if module is found), found


def check_ranks(name: str, ranks: Sequence[int], table: nn.Embedding) -> None:
    """Raise InvalidSpace unless a table can have all these ranks."""
    wrong = [rank for rank in ranks if not 1 <= rank <= table.embedding_dim]
    if wrong:
        raise InvalidSpace(
            f"{name}: rank {wrong[0]} of an embedding of width {table.embedding_dim}",
            try_=f"1 to {table.embedding_dim}, which is the table as it is",
        )


@torch.no_grad()
def make_factorisable(table: nn.Embedding, ranks: Sequence[int]) -> ElasticEmbedding:
    """Exchange the class of an embedding; the largest rank is active at first.

    Factors are trained if the table is; the table itself is only if its full size is a rank.
    """
    width = table.embedding_dim
    below = [rank for rank in ranks if rank < width]
    a, b = _factors(table.weight, max(below, default=0))
    table.__class__ = ElasticEmbedding
    assert isinstance(table, ElasticEmbedding)
    table.factor_a, table.factor_b = nn.Parameter(a), nn.Parameter(b)
    table.active_rank = max(ranks)
    return table


def unmake_factorisable(table: nn.Embedding) -> None:
    """Give an embedding its own class back; the factors are gone."""
    if isinstance(table, ElasticEmbedding):
        del table.factor_a, table.factor_b
        table.__dict__.pop("active_rank", None)
        table.__class__ = nn.Embedding  # type: ignore[assignment]


def _factors(weight: Tensor, rank: int, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return ``A`` ``(V, R)`` and ``B`` ``(R, D)`` of the largest rank."""
    exact = weight.detach().double()
    weighed = exact
    if counts is not None:
        # One more each: a token that the texts lack must be of use, too.
        weighed = exact * (counts.to(exact) + 1)[:, None]
    # V is far larger than D: the D x D matrix has the same right singular vectors.
    _, vectors = torch.linalg.eigh(exact.T @ weighed)
    vectors = vectors.flip(1)[:, :rank]
    # Which of the two directions a vector points to is chance; the largest entry is made positive.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * largest.sign()
    a, b = exact @ vectors, vectors.T
    return a.to(weight.dtype).contiguous(), b.to(weight.dtype).contiguous()
