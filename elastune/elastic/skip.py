"""Blocks and attention modules that can be switched off, without a change to their classes.

The module's class is exchanged for a subclass of it that looks at one flag; names, weights and
hooks stay as they are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from elastune.elastic.absent import AbsentAttention, note_length


class _Skippable(nn.Module):
    """A forward that can be passed over."""

    skipped: bool
    _plain_class: type[nn.Module]

    def set_active(self, size: int) -> None:
        """0 switches the module off, 1 on."""
        self.skipped = not size


class SkippableBlock(_Skippable):
    """Hands the hidden states on unchanged while it is off."""

    returns_tuple: bool
    skip_layer_idx: int | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.skipped:
            return super().forward(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        note_length(hidden, self.skip_layer_idx, *args, *kwargs.values())
        return (hidden, None) if self.returns_tuple else hidden


class SkippableAttention(_Skippable):
    """Gives zeros while it is off."""

    stand_in: AbsentAttention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.skipped:
            return super().forward(*args, **kwargs)
        return self.stand_in(*args, **kwargs)


@cache
def _subclass(kind: type[_Skippable], plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Skippable{plain.__name__}", (kind, plain), {"__module__": kind.__module__})


def make_skippable_block(
    block: nn.Module, *, returns_tuple: bool, layer_idx: int | None
) -> SkippableBlock:
    """Exchange a block's class; it is on at first."""
    plain = type(block)
    block.__class__ = _subclass(SkippableBlock, plain)  # type: ignore[arg-type]
    assert isinstance(block, SkippableBlock)
    block._plain_class = plain
    block.skipped = False
    block.returns_tuple = returns_tuple
    block.skip_layer_idx = layer_idx
    return block


def make_skippable_attention(attention: nn.Module, stand_in: AbsentAttention) -> SkippableAttention:
    """Exchange an attention module's class; it is on at first."""
    plain = type(attention)
    attention.__class__ = _subclass(SkippableAttention, plain)  # type: ignore[arg-type]
    assert isinstance(attention, SkippableAttention)
    attention._plain_class = plain
    attention.skipped = False
    attention.__dict__["stand_in"] = stand_in  # no child: it has no weights and no name
    return attention


def unmake_skippable(module: nn.Module) -> None:
    """Give a module its own class back."""
    if isinstance(module, _Skippable):
        plain = module._plain_class
        for name in ("skipped", "returns_tuple", "skip_layer_idx", "stand_in", "_plain_class"):
            module.__dict__.pop(name, None)
        module.__class__ = plain  # type: ignore[assignment]
