"""Attention within each sequence of a packed batch: no padding, no T x T mask.

transformers looks its attention function up by name in a public registry at every call. While
`packed_attention` is in force a model attends sequence by sequence, at the cost of the sequences'
own squared lengths instead of the batch's.

Shapes: `B` = 1 packed row, `H` heads, `G` key/value heads, `T` tokens, `D` head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

_NAME = "elastune_packed"


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
    parts = []
    for start, stop in pairwise(sequence_starts):
        length = stop - start
        mask = None
        if sliding_window is not None and length > sliding_window:
            mask = _window_mask(length, sliding_window, causal, query.device)
        parts.append(
            scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, start:stop],
                value[:, :, start:stop],
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal and mask is None,
                scale=scaling,
                enable_gqa=grouped,
            ).transpose(1, 2)
        )
    return torch.cat(parts, dim=1), None  # (1, T, H, D)


def _window_mask(length: int, window: int, causal: bool, device: torch.device) -> Tensor:
    """Return the boolean (length, length) mask of a sliding window."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    if causal:
        return (distance >= 0) & (distance < window)
    return distance.abs() < window


AttentionInterface.register(_NAME, _within_sequences)


def supports_packed_attention(model: PreTrainedModel) -> bool:
    """Tell whether the model's attention is plain scaled dot-product attention."""
    # Soft-capped scores (Gemma 2) need the eager kernel, with transformers' own packed mask.
    config = model.config.get_text_config()
    return bool(model._supports_sdpa) and getattr(config, "attn_logit_softcapping", None) is None


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let ``model`` attend within packed sequences as long as the context lasts.

    Backward passes with gradient checkpointing must happen inside it too. Models that
    `supports_packed_attention` refuses are left alone: transformers then finds the sequences by
    their restarting positions and builds a mask.
    """
    if not supports_packed_attention(model):
        yield
        return
    before = model.config._attn_implementation
    if before == _NAME:
        yield
        return
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
