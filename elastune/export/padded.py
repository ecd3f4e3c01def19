"""``hf-padded``: an ordinary checkpoint at the smallest sizes that all blocks fit in, the rest of
each block exact zeros.

It computes the same as the sub-network and loads anywhere, but is only as small and as fast as its
widest block: a channel of zeros costs what another does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastune.errors import UnsupportedModel
from elastune.export.base import (
    Exported,
    Format,
    embedding_notes,
    full_block,
    stock_state,
    with_weights,
)
from elastune.export.hf import uniform_model
from elastune.linears import in_features, is_linear, is_transposed, out_features
from elastune.models.architecture import type_of
from elastune.models.blocks import PARTS, Block, BlockShape, Weights, blocks
from elastune.models.families import record_for
from elastune.subnetwork import Subnetwork


def envelope(sub: Subnetwork) -> tuple[PreTrainedModel, BlockShape]:
    """Return a model without memory of the smallest sizes that hold all blocks, and those sizes.

    Raises:
        UnsupportedModel: the config of the family cannot say even the full sizes.
    """
    block = full_block(sub.model)
    most_heads = max(shape.heads for shape in sub.shapes)
    most_channels = max(1, *(shape.ffn for shape in sub.shapes))
    step = block.heads_per_unit
    heads = range(max(step, most_heads), block.shape.heads + 1, step)
    why = ""
    # From small to large; all channels come last, for families that have no field for them.
    for ffn in dict.fromkeys((most_channels, block.shape.ffn)):
        for n_heads in heads:
            shape = BlockShape(n_heads, block.kv_heads_at(n_heads), ffn)
            made, why = uniform_model(sub.model, shape, len(sub.shapes))
            if made is not None:
                return made, shape
    raise UnsupportedModel(f"this sub-network cannot be padded: {why}", try_="format hf-hetero")


@torch.no_grad()
def _make(sub: Subnetwork) -> Exported:
    made, shape = envelope(sub)
    state = {n: t for n, t in stock_state(sub.model).items() if n in made.state_dict()}
    adapters = dict(sub.adapter.weights) if sub.adapter is not None else {}
    own_blocks = record_for(type_of(sub.model)).blocks_of(sub.model)
    for block, own, module in zip(blocks(made), sub.shapes, own_blocks, strict=True):
        for name, tensor in _pad_block(block, own, module, sub.model.dtype).items():
            state[f"{block.name}.{name}"] = tensor
        for path, dim, index in _places(block, own):
            found = adapters.get(f"{block.name}.{path}")
            if found is not None:
                target = block.module.get_submodule(path)
                factor = _norm_factor(block, path, own)
                adapters[f"{block.name}.{path}"] = _pad_adapter(found, target, dim, index, factor)
    adapter = None if sub.adapter is None else replace(sub.adapter, weights=adapters)
    model = with_weights(made, sub.model, state)
    notes = (_note(sub, model), *embedding_notes(sub.model))
    return Exported(model, adapter, [shape] * len(sub.shapes), notes)


def _places(block: Block, own: BlockShape) -> Iterator[Weights]:
    """Yield where in a block of the common size the weights of a smaller one go."""
    for part in PARTS:
        n_units = own.ffn if part == "ffn" else own.heads // block.heads_per_unit
        yield from block.weights_of(part, torch.arange(n_units))


def _pad_block(
    block: Block, own: BlockShape, module: nn.Module, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the parameters of a block at the common size that are not those of its own."""
    found = {}
    have = dict(module.named_parameters())
    for name, target in block.module.named_parameters():
        if name not in have:  # of a half that is absent: what it computes is multiplied by zero
            found[name] = torch.zeros(target.shape, dtype=dtype)
    for path, dim, index in _places(block, own):
        target_module = block.module.get_submodule(path)
        for name, target in target_module.named_parameters(recurse=False):
            source = have.get(f"{path}.{name}")
            if source is not None:
                axis = 1 - dim if is_transposed(target_module) else dim
                factor = _norm_factor(block, path, own)
                factor = factor if is_linear(target_module) else 1 / factor
                padded = _spread(source, target.shape, axis, index)
                found[f"{path}.{name}"] = padded if factor == 1 else padded * factor
    return found


def _norm_factor(block: Block, path: str, own: BlockShape) -> float:
    """Return by how much q or k is scaled, and its norm back, where one norm spans all heads.

    Zeros lower the mean square that such a norm divides by. Larger features make up for it, so that
    its epsilon weighs as before; the norm's own weights undo it.
    """
    roles = {block.record.roles[role]: role for role in ("q", "k") if role in block.record.roles}
    for follower, role in block.record.attention.followers.items():
        module = dict(block.module.named_modules()).get(follower)
        if module is None or is_linear(module) or own.heads == 0:
            continue
        if path == follower or roles.get(path) == role:
            full, size = (
                (block.shape.heads, own.heads)
                if role == "q"
                else (block.shape.kv_heads, own.kv_heads)
            )
            return float((full / size) ** 0.5)
    return 1.0


def _spread(source: Tensor, shape: Sequence[int], axis: int, index: Tensor) -> Tensor:
    """Put rows or columns where they belong, zeros elsewhere."""
    if source.dim() == 1 and tuple(source.shape) == tuple(shape):
        return source.detach()  # a bias of the output, whichever columns there are
    padded = source.new_zeros(tuple(shape))
    axis = 0 if source.dim() == 1 else axis
    return padded.index_copy_(axis, index.to(source.device), source.detach())


def _pad_adapter(
    found: tuple[Tensor, Tensor, float], target: nn.Module, dim: int, index: Tensor, factor: float
) -> tuple[Tensor, Tensor, float]:
    """Give an adapter the in and out features of the layer at the common size."""
    a, b, scale = found
    if dim == 0:
        return a, factor * _spread(b, (out_features(target), b.shape[1]), 0, index), scale
    return _spread(a, (a.shape[0], in_features(target)), 1, index), b, scale


def _note(sub: Subnetwork, model: PreTrainedModel) -> str:
    """Say what padding costs."""
    padded = sum(p.numel() for p in model.parameters())
    needed = sum(p.numel() for p in sub.model.parameters())
    return (
        f"Padded with zeros to the widest block: {padded:,} weights are stored and computed with, "
        f"of which the sub-network needs {needed:,} ({100 * needed / padded:.0f} %). "
        "It loads anywhere, but is no faster than its widest block."
    )


def _why_not(sub: Subnetwork) -> str | None:
    try:
        envelope(sub)
    except UnsupportedModel as error:
        return error.message
    return None


PADDED = Format("hf-padded", "plain transformers", _why_not, _make)
