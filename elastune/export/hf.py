"""``hf``: an ordinary checkpoint. All blocks that are left must be alike, and their config must be
able to say so; which blocks are left out does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from elastune.export.base import (
    Exported,
    Format,
    embedding_notes,
    empty_model,
    full_block,
    stock_class,
    stock_config,
    stock_state,
    with_weights,
)
from elastune.models.blocks import BlockShape, blocks
from elastune.models.families import record_for
from elastune.subnetwork import Subnetwork


def uniform_model(
    model: PreTrainedModel, shape: BlockShape, n_blocks: int
) -> tuple[PreTrainedModel | None, str]:
    """Return a stock model without memory, all its blocks of one shape; or None, and why not.

    Its class is asked to build it: what the config of a family can say, nobody knows better.
    """
    config = stock_config(model)
    block = full_block(model)
    names = record_for(str(config.model_type)).config_names
    changed = [n for n, size in shape._asdict().items() if size != getattr(block.shape, n)]
    if "heads" in changed:
        # Not every class has this field; some honour it all the same.
        _set(config, names.get("head_dim", "head_dim"), block.head_dim)
    for name in changed:
        if name in names:
            _set(config, names[name], getattr(shape, name))
    config.num_hidden_layers = n_blocks
    words = ", ".join(f"{getattr(shape, name)} {_NOUNS[name]}" for name in changed)
    why = f"the config of {config.model_type} models cannot say {words}"
    try:
        _validate(config)
        made = empty_model(stock_class(model), config)
        found = blocks(made)
    except (ValueError, TypeError, RuntimeError, AttributeError, StrictDataclassError) as error:
        return None, f"{why}: {str(error).strip().splitlines()[-1].strip()}"
    fits = all(b.shape == shape and b.head_dim == block.head_dim for b in found)
    return (made, "") if fits else (None, why)


_NOUNS = {"heads": "heads", "kv_heads": "key/value heads", "ffn": "channels"}


def _set(config: Any, name: str, size: int) -> None:
    try:
        setattr(config, name, size)
    except AttributeError:  # computed from others: then the shapes will not fit
        return


def _validate(config: Any) -> None:
    """Apply the rules that the config has to keep when it is read from a file."""
    type(config).from_dict(config.to_dict())


def difference(shapes: Sequence[BlockShape]) -> str | None:
    """Return in what blocks are not alike, or that a half of one is missing."""
    for number, shape in enumerate(shapes):
        if not shape.heads or not shape.ffn:
            half = "feed-forward" if shape.heads else "attention"
            return f"block {number} has no {half}"
    for name, noun in _NOUNS.items():
        sizes = sorted({getattr(shape, name) for shape in shapes})
        if len(sizes) > 1:
            return f"the blocks have {_listed(sizes)} {noun}"
    return None


def _listed(sizes: Sequence[int]) -> str:
    if len(sizes) > 3:
        return f"from {sizes[0]} to {sizes[-1]}"
    return " or ".join(map(str, sizes))


def _why_not(sub: Subnetwork) -> str | None:
    unlike = difference(sub.shapes)
    if unlike is not None:
        return unlike
    return uniform_model(sub.model, sub.shapes[0], len(sub.shapes))[1] or None


def _make(sub: Subnetwork) -> Exported:
    """Return the model with a config that says its sizes; weights are shared."""
    made, why = uniform_model(sub.model, sub.shapes[0], len(sub.shapes))
    assert made is not None, why
    model = with_weights(made, sub.model, stock_state(sub.model))
    return Exported(model, sub.adapter, sub.shapes, embedding_notes(sub.model))


HF = Format("hf", "plain transformers", _why_not, _make)
