"""What stands where a sub-network has nothing: no weights, no work, the residual goes on.

This file imports nothing of elastune: exported models carry a copy of it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache


class AbsentLinear(nn.Module):
    """Zeros in place of a linear layer's output."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.in_features = 0
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: ``(..., any)``.  Returns: zeros, ``(..., out_features)``."""
        return x.new_zeros(*x.shape[:-1], self.out_features)


class AbsentAttention(nn.Module):
    """Zeros in place of an attention module's output, of ``width`` features.

    Args:
        width: of the output; 0 where the output projection stands outside.
        layer_idx: place in the cache.
        adds_residual: the module is to add its second argument, the residual.
    """

    def __init__(self, width: int, layer_idx: int | None, adds_residual: bool = False) -> None:
        super().__init__()
        self.width = width
        self.layer_idx = layer_idx
        self.adds_residual = adds_residual

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        note_length(hidden, self.layer_idx, *args, *kwargs.values())
        if self.adds_residual:
            return (args[1] if len(args) > 1 else kwargs["residual"]), None
        return hidden.new_zeros(*hidden.shape[:-1], self.width), None


def note_length(hidden: Tensor, layer_idx: int | None, *arguments: Any) -> None:
    """Tell the cache among a module's arguments, if there is one, how many tokens went by.

    The length of a cache is read off its first layer, so that a layer without keys must have an
    entry, too: one number a token.
    """
    cache = next((a for a in arguments if isinstance(a, Cache)), None)
    if cache is not None and layer_idx is not None:
        entry = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
        cache.update(entry, entry, layer_idx)
