"""Negative log-likelihood of given tokens, without holding all logits at once.

Shapes: `B` rows, `L` tokens, `D` model, `V` vocabulary, `N` scored positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from elastune.data import Encoded, encode
from elastune.errors import BadData
from elastune.generate import Progress, evaluating, unwrapped
from elastune.tasks.base import Example

_CHUNK_ELEMENTS = 2**24
"""Logits held at once: 64 MiB in float32."""


class MeanLoss(NamedTuple):
    """A mean negative log-likelihood.

    Attributes:
        loss: mean over tokens, in nats.
        stderr: its standard error, from the spread between texts.
        n: scored tokens.
    """

    loss: float
    stderr: float
    n: int


class TokenScorer:
    """Negative log-likelihoods under one causal LM.

    The head is applied to the scored positions alone, some at a time. That is right only for models
    whose logits are plainly ``head(hidden)`` (some scale or cap them): tried once, and otherwise
    the model's own forward is used.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        inner: Any = unwrapped(model)
        body = getattr(inner, "base_model", inner)
        self._body: nn.Module | None = None if body is inner else body
        self._vocabulary = 1
        self._head: Callable[[Tensor], Tensor] | None = inner.get_output_embeddings()
        if self._body is not None and not self._head_is_plain():
            self._body = None

    def __call__(self, input_ids: Tensor, mask: Tensor | None, targets: Tensor) -> Tensor:
        """Return the NLL in nats of the target tokens, float32, shape (N,).

        Args:
            input_ids: (B, L), padded on the right.
            mask: attention mask (B, L), or None without padding.
            targets: bool (B, L): tokens to score; the first of a row cannot be one.
        """
        if bool(targets[:, 0].any()):
            raise ValueError("the first token of a row has nothing to be predicted from")
        sources = targets.flatten().nonzero()[:, 0] - 1
        return self.at(sources, input_ids[targets], input_ids=input_ids, attention_mask=mask)

    def at(self, sources: Tensor, labels: Tensor, **inputs: Any) -> Tensor:
        """Return the NLL in nats of ``labels`` (N,), float32, shape (N,).

        Args:
            sources: (N,) indices into the B x L input tokens, row by row: the token whose output
                predicts the label.
            inputs: what the model's forward takes.
        """
        if self._body is None or self._head is None:
            logits = self.model(**inputs, use_cache=False).logits
            return _nll(logits.flatten(0, 1)[sources], labels)
        hidden = self._body(**inputs, use_cache=False)[0].flatten(0, 1)[sources]
        step = max(1, _CHUNK_ELEMENTS // self._vocabulary)
        parts = zip(hidden.split(step), labels.split(step), strict=True)
        return torch.cat([_nll(self._head(h), y) for h, y in parts])

    @torch.inference_mode()
    def _head_is_plain(self) -> bool:
        if self._head is None or self._body is None:
            return False
        ids = torch.arange(4, device=self.device)[None] + 1
        with evaluating(self.model):
            expected = self.model(input_ids=ids, use_cache=False).logits
            given = self._head(self._body(input_ids=ids, use_cache=False)[0])
        self._vocabulary = int(expected.shape[-1])
        return given.shape == expected.shape and torch.allclose(
            given.float(), expected.float(), rtol=1e-3, atol=1e-3
        )


def example_losses(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_length: int = 1024,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return per example the summed NLL of its completion and the completion's tokens.

    The completion includes its end-of-sequence token, as in training. Examples are batched by
    length; results stand in the input's order (float64 nats and int64 tokens, one per example), so
    that two models can be compared example by example. An example whose prompt fills
    ``max_length`` scores 0 tokens.
    """
    encoded = [encode(example, tokenizer, max_length) for example in examples]
    sums, counts = np.zeros(len(encoded)), np.zeros(len(encoded), dtype=np.int64)
    score = TokenScorer(model)
    n_done = 0
    for batch in batches_by_length([len(item.input_ids) for item in encoded], batch_tokens):
        sums[batch], counts[batch] = completion_losses(score, [encoded[i] for i in batch])
        n_done += len(batch)
        if progress is not None:
            progress(n_done, len(encoded))
    return sums, counts


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Cut items into batches of at most ``batch_tokens`` padded tokens, longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


@torch.inference_mode()
def completion_losses(score: TokenScorer, rows: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray]:
    """Score one batch: the summed NLL in nats of each row's completion, and its tokens."""
    counts = np.array([scored_tokens(row) for row in rows], dtype=np.int64)
    length = max(len(row.input_ids) for row in rows)
    if length < 2:
        return np.zeros(len(rows)), counts
    ids, mask = _right_padded([row.input_ids for row in rows], length, score.device)
    columns = torch.arange(length, device=score.device)[None]
    first = torch.tensor([max(1, row.n_prompt) for row in rows], device=score.device)[:, None]
    targets = (columns >= first) & mask.bool()
    is_padded = min(len(row.input_ids) for row in rows) < length
    with evaluating(score.model):
        nll = score(ids, mask if is_padded else None, targets)
    return np.array([float(p.double().sum()) for p in nll.split(counts.tolist())]), counts


def scored_tokens(row: Encoded) -> int:
    """Return how many tokens of a row are scored: its completion's, but never the first."""
    return max(0, len(row.input_ids) - max(1, row.n_prompt))


def mean_loss(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_length: int = 1024,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> MeanLoss:
    """Return the mean NLL in nats of completion tokens given their prompts.

    A cheap objective for the search: one forward pass, no generation.

    Raises:
        BadData: no completion token fits within ``max_length``.
    """
    sums, counts = example_losses(
        model,
        tokenizer,
        examples,
        max_length=max_length,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    return ratio_of_sums(sums, counts)


def text_loss(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    window: int,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> MeanLoss:
    """Return the mean NLL in nats over non-overlapping windows of ``window`` tokens of a text.

    See `window_losses`; ``progress`` is called with (scored windows, all windows).

    Raises:
        BadData: the text has less than two tokens.
    """
    total, losses = window_losses(model, tokenizer, text, window=window, batch_tokens=batch_tokens)
    sums, counts = np.zeros(total), np.zeros(total, dtype=np.int64)
    for n_done, (index, nll, tokens) in enumerate(losses, 1):
        sums[index], counts[index] = nll, tokens
        if progress is not None:
            progress(n_done, total)
    return ratio_of_sums(sums, counts)


def window_losses(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    window: int,
    batch_tokens: int = 8192,
    done: Set[int] = frozenset(),
) -> tuple[int, Iterator[tuple[int, float, int]]]:
    """Lay out the scoring of non-overlapping windows of ``window`` tokens of a text.

    The first token of a window is not predicted; the last window may be shorter, and is left out
    when it has a single token.

    Returns:
        The number of windows, and an iterator that scores those whose index is not in ``done``:
        (index, summed NLL in nats, predicted tokens).

    Raises:
        BadData: the text has less than two tokens.
    """
    ids = tokenizer(text, verbose=False).input_ids
    if len(ids) < 2:
        raise BadData(f"the text has {len(ids)} token(s); perplexity needs at least 2.")
    windows = [ids[start : start + window] for start in range(0, len(ids), window)]
    if len(windows[-1]) < 2:
        windows.pop()
    todo = [index for index in range(len(windows)) if index not in done]
    return len(windows), _score_windows(model, windows, todo, max(1, batch_tokens // window))


@torch.inference_mode()
def _score_windows(
    model: nn.Module, windows: list[list[int]], todo: list[int], size: int
) -> Iterator[tuple[int, float, int]]:
    """Score windows in batches of at most ``size`` that have one length."""
    if not todo:
        return
    score = TokenScorer(model)
    for _, same_length in groupby(todo, key=lambda index: len(windows[index])):
        indices = list(same_length)
        for start in range(0, len(indices), size):
            batch = indices[start : start + size]
            ids = torch.tensor([windows[index] for index in batch], device=score.device)
            targets = torch.ones_like(ids, dtype=torch.bool)
            targets[:, 0] = False
            with evaluating(model):
                nll = score(ids, None, targets).view(len(batch), -1)
            sums = nll.double().sum(dim=1).tolist()
            yield from (
                (index, loss, nll.shape[1]) for index, loss in zip(batch, sums, strict=True)
            )


def ratio_of_sums(sums: np.ndarray, counts: np.ndarray) -> MeanLoss:
    """Return sum(sums) / sum(counts) with its standard error by the delta method.

    Texts are the independent units, weighted by their tokens (ratio estimator: Cochran, Sampling
    Techniques, 3rd ed., eq. 6.13); ``nan`` standard error with a single text.

    Raises:
        BadData: no token was scored.
    """
    n_tokens = int(counts.sum())
    if n_tokens == 0:
        raise BadData(
            "no completion token could be scored.",
            try_="raise max_length, or check that the examples have completions",
        )
    mean = float(sums.sum() / n_tokens)
    n_texts = int((counts > 0).sum())
    if n_texts < 2:
        return MeanLoss(mean, float("nan"), n_tokens)
    residual = sums - mean * counts
    variance = n_texts / (n_texts - 1) * float((residual**2).sum()) / n_tokens**2
    return MeanLoss(mean, variance**0.5, n_tokens)


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.float(), labels, reduction="none")


def _right_padded(
    rows: list[list[int]], length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    ids = [row + [0] * (length - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
