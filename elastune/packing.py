"""Attention within each sequence of a packed batch: no padding, no T x T mask.

transformers looks its attention function up by name in a public registry at every call. While
`packed_attention` is in force a model attends sequence by sequence, at the cost of the sequences'
own squared lengths instead of the batch's. `segment_attention` does the same for sequences
that have a beginning in common: it stands in the row once.

Shapes: `B` = 1 packed row, `H` heads, `G` key/value heads, `T` tokens, `D` head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

_NAME = "elastune_packed"
_SEGMENTS = "elastune_segments"
_ROWS = "elastune_rows"
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}


def _within_sequences(
    module: nn.Module,
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, G, T, D)
    value: Tensor,  # (1, G, T, D)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    sequence_starts: tuple[int, ...] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend inside each of the sequences that begin at ``sequence_starts`` (last entry = T)."""
    if sequence_starts is None:
        raise RuntimeError("packed attention needs sequence_starts; leave packed_attention() first")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    grouped = query.shape[1] != key.shape[1]
    lengths = [stop - start for start, stop in pairwise(sequence_starts)]
    parts = []
    # Split, not sliced: a slice's gradient is as long as the whole row, and zero elsewhere.
    pieces = (states.split(lengths, dim=2) for states in (query, key, value))
    for length, q, k, v in zip(lengths, *pieces, strict=True):
        mask = None
        if sliding_window is not None and length > sliding_window:
            mask = _window_mask(length, sliding_window, causal, query.device)
        parts.append(
            scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal and mask is None,
                scale=scaling,
                enable_gqa=grouped,
            ).transpose(1, 2)
        )
    return torch.cat(parts, dim=1), None  # (1, T, H, D)


class Segment(NamedTuple):
    """Tokens of a packed row that attend to themselves and to what they go on from.

    Indices are those of keys; the row's queries are the last of them. A prefix begins its sequence
    (position 0) and the segment follows on it.

    Attributes:
        start: first token.
        stop: token after the last one.
        prefix: start and stop of the tokens it goes on from; empty for a sequence's beginning.
    """

    start: int
    stop: int
    prefix: tuple[int, int] = (0, 0)


def _within_segments(
    module: nn.Module,
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, G, P + T, D): P earlier tokens that are no queries now
    value: Tensor,  # (1, G, P + T, D)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segments: tuple[Segment, ...] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend causally inside each segment and its prefix; segments cover the queries in order."""
    if segments is None:
        raise RuntimeError("attention in segments needs them; leave segment_attention() first")
    grouped = query.shape[1] != key.shape[1]
    earlier = key.shape[2] - query.shape[2]
    parts = []
    for start, stop, (begin, end) in segments:
        keys, values = key[:, :, start:stop], value[:, :, start:stop]
        shared, length = end - begin, stop - start
        if shared:
            keys = torch.cat([key[:, :, begin:end], keys], dim=2)
            values = torch.cat([value[:, :, begin:end], values], dim=2)
        mask = None
        cut = sliding_window is not None and shared + length > sliding_window
        if cut or (shared and length > 1):
            mask = _continuation_mask(shared, length, sliding_window, query.device)
        parts.append(
            scaled_dot_product_attention(
                query[:, :, start - earlier : stop - earlier],
                keys,
                values,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and not shared,
                scale=scaling,
                enable_gqa=grouped,
            ).transpose(1, 2)
        )
    return torch.cat(parts, dim=1), None  # (1, T, H, D)


def _continuation_mask(
    shared: int, length: int, window: int | None, device: torch.device
) -> Tensor:
    """Return the boolean (length, shared + length) mask of tokens that follow ``shared`` others."""
    position = torch.arange(shared + length, device=device)
    distance = position[shared:, None] - position[None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def _one_token_per_row(
    module: nn.Module,
    query: Tensor,  # (B, H, 1, D)
    key: Tensor,  # (B, G, L, D): column = position; a row's later columns hold anything
    value: Tensor,  # (B, G, L, D)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    row_ends: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend from the one new token of each row, at position ``row_ends`` (B,), to its row."""
    if row_ends is None:
        raise RuntimeError("attention of rows needs row_ends; leave row_attention() first")
    rows, heads, _one, size = query.shape
    groups = key.shape[1]
    distance = row_ends[:, None].to(key.device) - torch.arange(key.shape[2], device=key.device)
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    # The heads that share a key stand in as that key's queries: nothing is repeated.
    out = scaled_dot_product_attention(
        query.view(rows, groups, heads // groups, size),
        key,
        value,
        attn_mask=visible[:, None, None, :],
        dropout_p=dropout,
        scale=scaling,
    )
    return out.reshape(rows, 1, heads, out.shape[-1]), None  # (B, 1, H, D)


def _window_mask(length: int, window: int, causal: bool, device: torch.device) -> Tensor:
    """Return the boolean (length, length) mask of a sliding window."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    if causal:
        return (distance >= 0) & (distance < window)
    return distance.abs() < window


AttentionInterface.register(_NAME, _within_sequences)
AttentionInterface.register(_SEGMENTS, _within_segments)
AttentionInterface.register(_ROWS, _one_token_per_row)


def supports_packed_attention(model: PreTrainedModel) -> bool:
    """Tell whether the model's attention is plain scaled dot-product attention, of the registry."""
    # Soft-capped scores (Gemma 2) need the eager kernel, with transformers' own packed mask.
    config = model.config.get_text_config()
    is_plain = bool(model._supports_sdpa) and reads_packed_rows(model)
    return is_plain and getattr(config, "attn_logit_softcapping", None) is None


def reads_packed_rows(model: PreTrainedModel) -> bool:
    """Tell whether the model can keep sequences apart that stand in one row.

    Models with attention code of their own (BLOOM, MPT, Falcon) ignore restarting positions and
    the registry alike: they need `padded_rows`.
    """
    return bool(getattr(model, "_supports_attention_backend", False))


class PaddedRows(NamedTuple):
    """The sequences of a packed row, one below the other."""

    input_ids: Tensor
    """``(S, L)``, filled up at the end."""
    attention_mask: Tensor
    """int64 ``(S, L)``, 1 where there is a token."""
    places: Tensor
    """int64 ``(T,)``: where each token of the packed row stands in the ``S * L``."""


def padded_rows(input_ids: Tensor, starts: Tensor) -> PaddedRows:
    """Unpack a row of tokens.

    Args:
        input_ids: ``(1, T)``.
        starts: ``(S + 1,)``, where sequences begin; the last entry is T.
    """
    starts = starts.to(input_ids.device).long()
    lengths = starts.diff()
    place = torch.arange(int(lengths.max()), device=input_ids.device)
    mask = place[None, :] < lengths[:, None]
    rows = input_ids.new_zeros(mask.shape)
    rows[mask] = input_ids[0]
    return PaddedRows(rows, mask.long(), mask.flatten().nonzero()[:, 0])


def supports_segments(model: nn.Module) -> bool:
    """Tell whether `segment_attention` and `row_attention` may be tried on a model.

    Its attention must go through transformers' registry, and be full or in sliding windows.
    """
    if not getattr(model, "_supports_attention_backend", False):
        return False
    model = cast(PreTrainedModel, model)
    layers = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return supports_packed_attention(model) and set(layers) <= _PLAIN_LAYERS


@contextmanager
def segment_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let ``model`` attend within segments of a packed row as long as the context lasts.

    Its forward then needs ``position_ids`` and ``segments``. Only for models that
    `supports_packed_attention` accepts.
    """
    with _attention(model, _SEGMENTS):
        yield


@contextmanager
def row_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let ``model`` decode one token of each row as long as the context lasts.

    Its forward then needs ``position_ids``, ``row_ends`` (the same numbers, flat) and a cache
    whose columns are positions. Only for models that `supports_packed_attention` accepts.
    """
    with _attention(model, _ROWS):
        yield


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let ``model`` attend within packed sequences as long as the context lasts.

    Backward passes with gradient checkpointing must happen inside it too. Models that
    `supports_packed_attention` refuses are left alone: transformers then finds the sequences by
    their restarting positions and builds a mask, if `reads_packed_rows`.
    """
    if not supports_packed_attention(model):
        yield
        return
    with _attention(model, _NAME):
        yield


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    if before == name:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
