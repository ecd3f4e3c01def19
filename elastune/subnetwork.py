"""A super-network and a configuration -> a plain, smaller model of the model's own class.

Nothing elastic is left in it: linear layers of the size they have, blocks that are there, fields
that say how many heads there are. None of the papers has this: LoNAS evaluates inside the
super-network, EFTNAS slices widths but not depth.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastune.drop_blocks import keep_blocks_
from elastune.elastic.absent import AbsentAttention, AbsentLinear
from elastune.elastic.linear import (
    ElasticConv1D,
    ElasticLinear,
    ElasticNorm,
    take,
    unmake_sliceable,
)
from elastune.elastic.lora import ElasticLoRALinear
from elastune.elastic.merge_rules import Int4Grid
from elastune.elastic.skip import unmake_skippable
from elastune.errors import InvalidSubnet
from elastune.extract import PeftAdapter, refuse_unmerged, sub_adapter
from elastune.linears import is_transposed, out_features
from elastune.models.blocks import PARTS, Block, BlockShape
from elastune.space import SubnetConfig
from elastune.structure import absent_attention
from elastune.supernet import SuperNetwork


@dataclass(frozen=True)
class Subnetwork:
    """An extracted sub-network.

    Attributes:
        config: the configuration it was cut for.
        model: plain; its class is that of the super-network's model.
        shapes: sizes of the blocks that are left, in order.
        kept_blocks: their numbers in the super-network.
        adapter: the sub-adapter for ``model``, where it was not merged and is not all of rank 0.
        grids: module name -> the INT4 grid that its weight lies on.
    """

    config: SubnetConfig
    model: PreTrainedModel
    shapes: tuple[BlockShape, ...]
    kept_blocks: tuple[int, ...]
    adapter: PeftAdapter | None = None
    grids: Mapping[str, Int4Grid] = field(default_factory=dict)


@torch.no_grad()
def extract_model(net: SuperNetwork, config: SubnetConfig, *, merge: bool = True) -> Subnetwork:
    """Cut the sub-network of ``config`` out of a super-network, as a model of its own.

    Args:
        net: stays as it is; no weight is shared with it.
        config: of its space.
        merge: add the adapter to the weights (W + s B A). Zeros of a sparse base are lost where an
            adapter is added, unless the super-network keeps them (``keep``); with False they stay,
            and the adapter comes beside the model.

    Raises:
        InvalidSubnet: not in the space, every block left out, or an adapter that cannot be merged.
    """
    if not merge:
        refuse_unmerged(net)
    shapes = net.shapes(config)
    kept = tuple(index for index, shape in enumerate(shapes) if shape is not None)
    if not kept:
        raise InvalidSubnet(
            "every block of this sub-network is left out: nothing remains",
            try_="keep one block at least",
        )
    whole = net.blocks
    adapter = None
    with net.active(config):
        replaced = _active_weights(whole, shapes)
        if net.embedding is not None:
            replaced[id(net.embedding)] = net.embedding.extract()
        alive = {name: a for name, a in net.adapters.items() if _stands(name, whole, kept)}
        if merge:
            for name, lora in alive.items():
                _merge(replaced, name, lora)
        else:
            adapter = _for_kept_blocks(net, config, alive, whole, kept)
        model = copy.deepcopy(net.model, replaced)
    _make_plain(model, whole, shapes)
    model.requires_grad_(True)
    model.eval()
    left = tuple(shape for shape in shapes if shape is not None)
    return Subnetwork(config, model, left, kept, adapter, net.grids if merge else {})


def _active_weights(whole: Sequence[Block], shapes: Sequence[BlockShape | None]) -> dict[int, Any]:
    """Return what `copy.deepcopy` is to take for each cut parameter, by the parameter's id.

    The full-size weights are then never copied.
    """
    found: dict[int, Any] = {}
    for block in whole:
        if shapes[block.index] is None:
            found[id(block.module)] = nn.Identity()
            continue
        for module in block.module.modules():
            if isinstance(module, ElasticLinear | ElasticConv1D):
                weight = module.active_weight()
                weight = weight.T if is_transposed(module) else weight
                found[id(module.weight)] = _parameter(weight)
                if module.mask is not None:
                    found[id(module.mask)] = None  # its work is done
                if module.bias is not None:
                    found[id(module.bias)] = _parameter(take(module.bias, 0, module.rows))
            elif isinstance(module, ElasticNorm):
                for parameter in module.parameters(recurse=False):
                    found[id(parameter)] = _parameter(take(parameter, 0, module.rows))
    return found


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format))


def _stands(name: str, whole: Sequence[Block], kept: Sequence[int]) -> bool:
    """Tell whether a module is in a block that is kept, or outside of all blocks."""
    home = next((b.index for b in whole if name.startswith(f"{b.name}.")), None)
    return home is None or home in kept


def _merge(replaced: dict[int, Any], name: str, lora: ElasticLoRALinear) -> None:
    """Put W + s B A in the place of a weight."""
    if lora.is_off:
        return
    base: Any = lora.base
    if not base.weight.is_floating_point() or base.weight.dim() != 2:
        raise InvalidSubnet(
            f"the weight of {name} is quantised, so that no adapter can be added to it",
            try_="merge=False",
        )
    stored = replaced.setdefault(id(base.weight), _parameter(base.weight))
    weight = stored.T if is_transposed(base) else stored
    weight.copy_(lora.merge(weight))


def _for_kept_blocks(
    net: SuperNetwork,
    config: SubnetConfig,
    alive: dict[str, ElasticLoRALinear],
    whole: Sequence[Block],
    kept: Sequence[int],
) -> PeftAdapter | None:
    """Return the sub-adapter under the names that its modules have once blocks are gone."""
    if all(lora.is_off for lora in alive.values()) and not net.trained:
        return None
    adapter = sub_adapter(net, config)
    names = {}
    for new, old in enumerate(kept):
        place = whole[old].name
        names[place] = f"{place.rpartition('.')[0]}.{new}"
    weights = {}
    for name, value in adapter.weights.items():
        if name in alive:
            home = next((place for place in names if name.startswith(f"{place}.")), None)
            new_name = name if home is None else names[home] + name[len(home) :]
            weights[new_name] = value
    return replace(adapter, weights=weights)


def _make_plain(
    model: PreTrainedModel, whole: Sequence[Block], shapes: Sequence[BlockShape | None]
) -> None:
    """Turn the copy of an elastic model into a model of stock modules, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ElasticLoRALinear):
            model.set_submodule(name, module.base)
    for module in list(model.modules()):
        unmake_sliceable(module)
        unmake_skippable(module)
    for block, shape in zip(whole, shapes, strict=True):
        if shape is not None:
            _fit(block, model.get_submodule(block.name), shape)
    kept = [index for index, shape in enumerate(shapes) if shape is not None]
    keep_blocks_(model, [block.name for block in whole], kept)


def _fit(block: Block, module: nn.Module, shape: BlockShape) -> None:
    """Make a block's modules say the sizes they have, and put nothing where there is nothing."""
    record = block.record
    held = dict(module.named_modules())  # without halves that a model cut before has lost
    for part in PARTS:
        for role in block.roles_of(part):
            linear = held.get(record.roles[role])
            if linear is None or isinstance(linear, AbsentLinear):
                continue
            _tell_features(linear)
            if getattr(shape, part) == 0:
                width = out_features(linear) if role in ("o", "down") else 0
                module.set_submodule(record.roles[role], AbsentLinear(width))
    attention: Any = held[record.attention.path]
    if isinstance(attention, AbsentAttention):
        return
    if shape.heads == 0:
        module.set_submodule(record.attention.path, absent_attention(block))
        return
    for path in record.attention.followers:
        if path in held:
            _tell_features(held[path])


def _tell_features(module: Any) -> None:
    """Let a linear layer's fields say the shape of its weight."""
    if module.weight.dim() != 2:
        return
    rows, columns = module.weight.shape
    if is_transposed(module):
        module.nx, module.nf = rows, columns
    else:
        module.out_features, module.in_features = rows, columns
