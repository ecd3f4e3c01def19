"""What a format of exported models is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from elastune.elastic.factorised import FactorisedEmbedding
from elastune.extract import PeftAdapter
from elastune.models.blocks import Block, BlockShape, blocks
from elastune.models.per_layer_model import PerLayerModel
from elastune.subnetwork import Subnetwork


@dataclass(frozen=True)
class Exported:
    """A sub-network in the form in which it is saved.

    Attributes:
        model: what is saved; it may share weights with the sub-network.
        adapter: its adapter, where it has one.
        sizes: of the blocks as they are saved.
        notes: what the user should know, a sentence each.
    """

    model: PreTrainedModel
    adapter: PeftAdapter | None
    sizes: Sequence[BlockShape]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """One way to save a sub-network.

    Attributes:
        name: as users write it.
        loads_with: where it loads, in a few words.
        why_not: what of a sub-network it cannot hold, or None.
        make: a sub-network -> what is saved.
    """

    name: str
    loads_with: str
    why_not: Callable[[Subnetwork], str | None]
    make: Callable[[Subnetwork], Exported]


def stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the class of transformers that a model is of, or is made of."""
    cls = type(model)
    return cls.__bases__[-1] if isinstance(model, PerLayerModel) else cls


def stock_config(model: PreTrainedModel) -> Any:
    """Return a copy of a model's config that is of the stock class, all layers alike."""
    config: Any = model.config
    return config.uniform() if isinstance(model, PerLayerModel) else copy.deepcopy(config)


def empty_model(cls: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """Build a model without memory for its weights."""
    with torch.device("meta"):
        model: PreTrainedModel = cls(config)  # type: ignore[call-arg]
    return model


def full_block(model: PreTrainedModel) -> Block:
    """Return a block of the sizes that a model's config says of all, whatever its own are."""
    return blocks(empty_model(stock_class(model), stock_config(model)))[0]


def factorised_embedding(model: PreTrainedModel) -> FactorisedEmbedding | None:
    """Return a model's word embedding if it is of low rank."""
    found = model.get_input_embeddings()
    return found if isinstance(found, FactorisedEmbedding) else None


@torch.no_grad()
def stock_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a model's weights under the names of its stock class: factors multiplied out."""
    state: dict[str, Tensor] = model.state_dict()
    table = factorised_embedding(model)
    if table is not None:
        name = next(n for n, module in model.named_modules() if module is table)
        state = {n: t for n, t in state.items() if not n.startswith(f"{name}.")}
        state[f"{name}.weight"] = table.weight.detach()
    return state


def embedding_notes(model: PreTrainedModel) -> tuple[str, ...]:
    """Say what it costs to save an embedding of low rank as a stock class holds it."""
    table = factorised_embedding(model)
    if table is None:
        return ()
    rows, width = table.num_embeddings, table.embedding_dim
    return (
        f"The embedding of rank {table.rank} is multiplied out: {rows * width:,} weights are "
        f"stored, {table.rank * (rows + width):,} of which would do. Format hf-hetero keeps the "
        "factors.",
    )


def with_weights(
    made: PreTrainedModel, model: PreTrainedModel, state: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """Give a model without memory the weights and generation settings of another.

    Args:
        made: from `empty_model`.
        model: with weights under the same names.
        state: those weights, where they are not the model's own.
    """
    made.load_state_dict(model.state_dict() if state is None else state, assign=True)
    made.tie_weights()
    made.eval()
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    return made
