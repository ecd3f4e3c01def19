"""Magnitude: score = |W|."""

from __future__ import annotations

from torch import Tensor


def magnitude_scores(weight: Tensor) -> Tensor:
    """Return ``|W|``, shape ``(O, I)``, float32."""
    return weight.detach().float().abs()
