"""``hf-hetero``: every block at its own size, in one ``per_layer_config`` of config.json.

The folder carries a modelling file of its own, which needs transformers 5.15 or later.
"""

from __future__ import annotations

from typing import Any

from elastune.errors import UnsupportedModel
from elastune.export.base import (
    Exported,
    Format,
    empty_model,
    factorised_embedding,
    full_block,
    stock_class,
    stock_config,
    with_weights,
)
from elastune.models.blocks import BlockShape
from elastune.models.per_layer_config import HALVES
from elastune.models.registration import FamilyClasses, family_classes
from elastune.subnetwork import Subnetwork


def _make(sub: Subnetwork) -> Exported:
    """Return the model in a class whose layers have sizes of their own; weights are shared.

    Raises:
        UnsupportedModel: a task head that no auto class loads.
    """
    stock = stock_class(sub.model)
    config = stock_config(sub.model)
    classes = family_classes(str(config.model_type))
    made = next((m for m in classes.models.values() if m.__bases__[-1] is stock), None)
    if made is None:
        known = ", ".join(m.__bases__[-1].__name__ for m in classes.models.values())
        raise UnsupportedModel(
            f"a {stock.__name__} cannot be saved with blocks of different sizes", try_=known
        )
    _tell_sizes(config, sub, classes)
    model = empty_model(made, config)
    return Exported(with_weights(model, sub.model), sub.adapter, sub.shapes)


def _tell_sizes(config: Any, sub: Subnetwork, classes: FamilyClasses) -> None:
    """Turn a stock config into one that also says the sizes of single blocks."""
    config.__class__ = classes.config
    vars(config).pop("model_type", None)  # the class says it; read from a file, it stands here too
    config.architectures = None  # set when the model is saved
    block = full_block(sub.model)
    fields = classes.family.fields
    whole = {fields[name]: size for name, size in block.shape._asdict().items()}
    # Some families have no such fields and compute these; caches ask for the size of a head.
    for name, size in (whole | {"head_dim": block.head_dim}).items():
        setattr(config, name, size)
    found = {}
    for number, shape in enumerate(sub.shapes):
        own = _own_sizes(shape, block.shape, fields)
        if own:
            found[number] = own
    config.per_layer_config = found
    table = factorised_embedding(sub.model)
    if table is not None:
        config.embedding_rank = table.rank


def _own_sizes(shape: BlockShape, full: BlockShape, fields: Any) -> dict[str, Any]:
    """Return what a block has of its own: sizes, and which halves it skips."""
    sizes = {n: s for n, s in shape._asdict().items() if s and s != getattr(full, n)}
    own: dict[str, Any] = {fields[name]: size for name, size in sizes.items()}
    skipped = [
        half for half, size in zip(HALVES, (shape.heads, shape.ffn), strict=True) if not size
    ]
    return own | ({"skip": skipped} if skipped else {})


HETERO = Format(
    "hf-hetero",
    "transformers 5.15 or later with trust_remote_code=True, or without it after import elastune",
    lambda sub: None,
    _make,
)
