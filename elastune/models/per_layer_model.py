"""A stock model whose blocks are then made as wide as `PerLayerConfig` says.

This file imports nothing of elastune but files that are copied with it: exported models carry a
copy of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from elastune.elastic.absent import AbsentAttention, AbsentLinear
from elastune.elastic.factorised import FactorisedEmbedding
from elastune.elastic.sizes import ConfigView, set_sizes


@dataclass(frozen=True)
class Family:
    """Where the blocks of a family of models keep what can differ in size.

    Attributes:
        blocks: path of the block list below the base model.
        roles: what a linear layer does -> its path in a block. ``qkv`` and ``gate_up`` are fused.
        attention: path of the attention module in a block.
        head_dim: its field that says how large a head is.
        sizes: its further fields -> heads, kv_heads, groups or width (heads times head size);
            ``config.x`` is a field of the config it reads.
        followers: further modules in a block -> the role whose rows they have.
        adds_residual: the attention module adds the residual itself.
        fields: heads, kv_heads, ffn -> the field of the config.
    """

    blocks: str
    roles: Mapping[str, str]
    attention: str
    head_dim: str
    sizes: Mapping[str, str]
    followers: Mapping[str, str]
    adds_residual: bool
    fields: Mapping[str, str]


class LayerSizes(NamedTuple):
    """Sizes of one block; 0 heads or channels mean that this half is not there."""

    heads: int
    kv_heads: int
    ffn: int


class PerLayerModel:
    """Mixed into a stock model class, it makes the layers as wide as the config says of each."""

    family: ClassVar[Family]

    def __init__(self, config: Any, *inputs: Any, **options: Any) -> None:
        super().__init__(config.uniform(), *inputs, **options)  # type: ignore[call-arg]
        model: Any = self
        uniform = model.config
        if getattr(config, "embedding_rank", None):
            _factorise(model, config.embedding_rank)
        # What the stock class found out, such as the kind of attention, holds for all layers.
        vars(config).update(vars(uniform))
        views: dict[int | None, Any] = {None: _view(config, uniform, self.family)}
        blocks = model.base_model.get_submodule(self.family.blocks)
        for number, block in enumerate(blocks):
            _fit(block, number, layer_sizes(config, number, self.family), self.family)
            views[number] = _view(config, config.per_layer_config[number], self.family)
        _set_configs(model, config, blocks, views)


def _factorise(model: Any, rank: int) -> None:
    """Put a product of low rank in the place of the word embedding."""
    if model.get_output_embeddings() is not None and model.config.tie_word_embeddings:
        raise ValueError(f"the output head cannot be tied to an embedding of rank {rank}")
    table = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is table)
    rows, width = table.weight.shape
    made = FactorisedEmbedding(rows, rank, width, table.padding_idx)
    model.set_submodule(name, made.to(table.weight.dtype))


def layer_sizes(config: Any, number: int, family: Family) -> LayerSizes:
    """Return the sizes that a config says of one layer."""
    layer = config.per_layer_config[number]
    skipped = getattr(layer, "skip", ())
    heads, kv_heads, ffn = (getattr(layer, family.fields[name]) for name in LayerSizes._fields)
    if "attention" in skipped:
        heads = kv_heads = 0
    return LayerSizes(heads, kv_heads, 0 if "mlp" in skipped else ffn)


def _fit(block: nn.Module, number: int, sizes: LayerSizes, family: Family) -> None:
    """Cut the linear layers of one block, or take them away; say so in its fields."""
    attention: Any = block.get_submodule(family.attention)
    head_dim = getattr(attention, family.head_dim)
    q, kv = sizes.heads * head_dim, sizes.kv_heads * head_dim
    rows = {"qkv": q + 2 * kv, "q": q, "k": kv, "v": kv}
    rows |= {"gate_up": 2 * sizes.ffn, "gate": sizes.ffn, "up": sizes.ffn}
    columns = {"o": q, "down": sizes.ffn}
    hidden = _out_features(block.get_submodule(family.roles["o"]))
    for role, path in family.roles.items():
        if rows.get(role, columns.get(role)):
            resize(block.get_submodule(path), rows.get(role), columns.get(role))
        else:
            block.set_submodule(path, AbsentLinear(hidden if role in columns else 0))
    if sizes.heads == 0:
        # Where the output projection stands outside, it is absent by itself.
        is_inside = f"{family.roles['o']}.".startswith(f"{family.attention}.")
        layer_idx = number if hasattr(attention, "layer_idx") else None
        width = hidden if is_inside else 0
        stand_in = AbsentAttention(width, layer_idx, family.adds_residual)
        block.set_submodule(family.attention, stand_in)
        return
    found = dict(block.named_modules())
    for path, role in family.followers.items():
        if path in found:
            resize(found[path], rows[role], None)
    fields = _attention_fields(sizes, head_dim, family)
    set_sizes(attention, {k: v for k, v in fields.items() if "." not in k})
    if hasattr(attention, "num_key_value_groups"):
        attention.num_key_value_groups = sizes.heads // sizes.kv_heads


def resize(module: Any, rows: int | None, columns: int | None) -> None:
    """Keep the first rows (out features) and columns (in features) of a linear layer or norm."""
    turned = hasattr(module, "nx")  # transformers' Conv1D: its weight is (in, out)
    for name, parameter in list(module.named_parameters(recurse=False)):
        first, second = (columns, rows) if turned else (rows, columns)
        cut = parameter[:first, :second] if parameter.dim() == 2 else parameter[:rows]
        if cut.shape != parameter.shape:
            copied = cut.detach().clone(memory_format=torch.contiguous_format)
            setattr(module, name, nn.Parameter(copied, parameter.requires_grad))
    names = (
        {"nf": rows, "nx": columns} if turned else {"out_features": rows, "in_features": columns}
    )
    for name, size in names.items():
        if size is not None and hasattr(module, name):
            setattr(module, name, size)
    if rows is not None and hasattr(module, "normalized_shape"):
        module.normalized_shape = (rows,)


def _attention_fields(sizes: LayerSizes, head_dim: int, family: Family) -> dict[str, int]:
    values = {
        "heads": sizes.heads,
        "kv_heads": sizes.kv_heads,
        "groups": sizes.heads // max(sizes.kv_heads, 1),
        "width": sizes.heads * head_dim,
    }
    return {name: values[what] for name, what in family.sizes.items()}


def _view(config: Any, source: Any, family: Family) -> ConfigView:
    """Return a config with the sizes of a layer (or of a stock config), all else as it is live.

    Read from the whole config, a size that is not the same everywhere is an error.
    """
    names = set(family.fields.values())
    names |= {name.partition(".")[2] for name in family.sizes if "." in name}
    names |= {alias for alias, name in config.attribute_map.items() if name in names}
    return ConfigView(config, {name: getattr(source, name) for name in names})


def _set_configs(
    model: nn.Module, config: Any, blocks: Any, views: Mapping[int | None, Any]
) -> None:
    """Give models the whole config, and modules that keep one the view of their own block."""
    home = {id(part): number for number, block in enumerate(blocks) for part in block.modules()}
    models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    shared = {id(part.config) for part in models}
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) and id(getattr(part, "config", None)) in shared:
            part.config = views[home.get(id(part))]
    for part in models:
        part.config = config


def _out_features(module: nn.Module) -> int:
    return int(module.nf if hasattr(module, "nf") else module.out_features)  # type: ignore[arg-type]
