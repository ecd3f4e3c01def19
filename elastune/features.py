"""What a student can learn of its teacher besides logits: hidden states, and attention relations.

Both are taken by forward hooks, so that model classes stay as they are. Every sequence counts as
its targets do: its mean over positions, times its number of targets, summed; divided by all
targets, as losses are, that does not depend on how sequences were put into batches.

Sources: the hidden states that enter the last norm, by squared error (Romero et al. 2015, FitNets,
with no projection in between); relations of queries, of keys and of values (Wang et al. 2021,
MiniLMv2, equations 3 to 5).

Deviations from MiniLMv2: relations are of the projections' outputs, before any norm of single heads
and rotation by position; the layer is the last one of both networks; see `relation_heads`.

Shapes: `S` sequences, `L` tokens of the longest, `T` tokens in all, `D` hidden size, `W` width of a
projection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elastune.config import DistillConfig
from elastune.errors import BadRecipe
from elastune.linears import out_features
from elastune.models.blocks import Block, blocks

_HIDDEN = "hidden"


class Sequences(NamedTuple):
    """Where the sequences of a batch have tokens, and how much each counts."""

    mask: Tensor
    """bool ``(S, L)``: False at padding, which is at the end."""
    targets: Tensor
    """``(S,)``: the targets of each sequence."""


class Features(NamedTuple):
    """What hooks saw in one forward pass; None where nothing was to be seen, or nothing ran."""

    hidden: Tensor | None
    """``(S, L, D)``, or ``(1, T, D)`` of a packed batch: what the last block hands on."""
    projections: tuple[Tensor, Tensor, Tensor] | None
    """Queries, keys and values of the last attention, ``(..., W)`` each, heads side by side."""
    head_dim: int
    """Size of one attention head."""

    def detach(self) -> Features:
        """Return the same features cut off from what made them."""
        hidden = None if self.hidden is None else self.hidden.detach()
        if self.projections is None:
            return Features(hidden, None, self.head_dim)
        q, k, v = self.projections
        return Features(hidden, (q.detach(), k.detach(), v.detach()), self.head_dim)


class FeatureHooks:
    """Sees hidden states and projections of a model, whatever sub-network of it is active.

    Args:
        model: stock, elastic or with blocks of several sizes.
        hidden: see what the last block hands on.
        relations: see queries, keys and values of the last block that has attention.

    Raises:
        UnsupportedModel: no record of this family.
        BadRecipe: relations are wanted of a model without attention.
    """

    def __init__(self, model: PreTrainedModel, *, hidden: bool, relations: bool) -> None:
        found = blocks(model)
        self.causal = found[-1].record.kind == "decoder"
        self.last = found[-1].module if hidden else None
        down = found[-1].record.roles["down"]
        self.hidden_size = out_features(found[-1].module.get_submodule(down))
        self.block: Block | None = None
        if relations:
            attending = [block for block in found if block.shape.heads > 0]
            if not attending:
                raise BadRecipe(
                    "train.distill.relations needs attention, and no block has any left",
                    try_="train.distill.relations=0",
                )
            self.block = attending[-1]

    @contextmanager
    def capture(self) -> Iterator[dict[str, Any]]:
        """Yield what is filled by the forward pass in the context; `features` reads it.

        The hooks are gone before the backward pass, in which gradient checkpointing runs modules
        again.
        """
        seen: dict[str, Any] = {}
        handles = []
        for name, module in self._watched():

            def keep(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                # The first call: DeBERTa projects its relative positions with the same modules.
                seen.setdefault(name, output[0] if isinstance(output, tuple) else output)

            handles.append(module.register_forward_hook(keep))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def features(self, seen: dict[str, Any]) -> Features:
        """Return what `capture` saw."""
        if self.block is None:
            return Features(seen.get(_HIDDEN), None, 0)
        head_dim = self.block.head_dim
        if "qkv" in seen:
            return Features(seen.get(_HIDDEN), split_qkv(seen["qkv"], self.block), head_dim)
        if not {"q", "k", "v"} <= seen.keys():  # its attention, or all of it, is switched off
            return Features(seen.get(_HIDDEN), None, head_dim)
        return Features(seen.get(_HIDDEN), (seen["q"], seen["k"], seen["v"]), head_dim)

    def _watched(self) -> Iterator[tuple[str, nn.Module]]:
        if self.last is not None:
            yield _HIDDEN, self.last
        if self.block is not None:
            for role in ("qkv", "q", "k", "v"):
                if role in self.block.record.roles:
                    yield role, self.block.module.get_submodule(self.block.record.roles[role])


def feature_hooks(model: PreTrainedModel, cfg: DistillConfig) -> FeatureHooks | None:
    """Return hooks for what is learnt besides logits; None where that is nothing."""
    if not cfg.needs_features:
        return None
    return FeatureHooks(model, hidden=cfg.hidden > 0, relations=cfg.relations > 0)


def split_qkv(output: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return queries, keys and values of a fused projection's output ``(..., W)``; None of none.

    Fewer heads than the block's may be active.
    """
    size, count = block.head_dim, output.shape[-1] // block.head_dim
    if count == 0:
        return None
    if block.layout == "by_group":
        per = block.heads_per_unit
        groups = output.unflatten(-1, (-1, per + 2, size))
        parts = groups.split([per, 1, 1], dim=-2)
        q, k, v = (part.flatten(-3) for part in parts)
        return q, k, v
    is_shared = block.shape.kv_heads == 1
    kv_heads = 1 if is_shared else count // (block.heads_per_unit + 2)
    q, k, v = output.split([(count - 2 * kv_heads) * size, kv_heads * size, kv_heads * size], -1)
    return q, k, v


def check_features(student: FeatureHooks, teacher: FeatureHooks) -> None:
    """Raise BadRecipe unless the hidden states that are to be compared have one size."""
    if student.last is not None and student.hidden_size != teacher.hidden_size:
        raise BadRecipe(
            f"train.distill.hidden compares hidden states of one size, and the teacher's have "
            f"{teacher.hidden_size} features, the student's {student.hidden_size}",
            try_="train.distill.relations, which compares networks of any sizes",
        )


def hidden_loss(student: Features, teacher: Features, sequences: Sequences) -> Tensor:
    """Return the squared error, the mean over features and positions, summed over targets."""
    assert student.hidden is not None
    assert teacher.hidden is not None
    own = as_rows(student.hidden, sequences.mask).float()
    wanted = as_rows(teacher.hidden.detach(), sequences.mask).float()
    return _over_targets((own - wanted).square().mean(-1), sequences)


def relation_loss(
    student: Features, teacher: Features, sequences: Sequences, *, causal: bool
) -> Tensor | None:
    """Return KL(teacher || student) of relations between tokens, summed over targets.

    A relation is softmax(X X^T / sqrt(d)), row by row, of queries, of keys or of values X that are
    cut into `relation_heads` of size d. The loss is the mean over heads and positions, added up
    over the three kinds. None where one of the two has no attention there.

    Args:
        causal: tokens are compared with themselves and those before, alone.
    """
    if student.projections is None or teacher.projections is None:
        return None
    mask = sequences.mask
    visible = mask[:, None, None, :]  # (S, 1, 1, L)
    if causal:
        length = mask.shape[1]
        visible = visible & torch.ones(length, length, device=mask.device).tril().bool()
    total: Tensor | None = None
    # Products of half precision would be rounded before the softmax.
    with torch.autocast(mask.device.type, enabled=False):
        for own, wanted in zip(student.projections, teacher.projections, strict=True):
            heads = relation_heads(
                own.shape[-1], wanted.shape[-1], at_most=wanted.shape[-1] // teacher.head_dim
            )
            log_p = _relations(as_rows(wanted.detach(), mask), heads, visible)
            log_q = _relations(as_rows(own, mask), heads, visible)
            divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)  # (S, L)
            loss = _over_targets(divergence, sequences)
            total = loss if total is None else total + loss
    return total


def relation_heads(student: int, teacher: int, *, at_most: int) -> int:
    """Return into how many heads two projections of these widths are cut to be compared.

    That is the largest number up to ``at_most``, the teacher's own heads, that divides both widths.
    MiniLMv2 uses more than the teacher has (48 of 768 features); every relation costs L^2 numbers.
    """
    common = math.gcd(student, teacher)
    return max(n for n in range(1, max(at_most, 1) + 1) if common % n == 0)


def as_rows(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return ``(S, L, X)`` of a packed ``(1, T, X)``, zeros at padding; padded ones as they are."""
    if tensor.shape[:2] == mask.shape:
        return tensor
    rows = tensor.new_zeros(*mask.shape, tensor.shape[-1])
    rows[mask] = tensor[0]
    return rows


def _relations(rows: Tensor, heads: int, visible: Tensor) -> Tensor:
    """Return the logarithms of the relations ``(S, heads, L, L)`` of ``(S, L, W)``."""
    x = rows.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = x @ x.transpose(-1, -2) / math.sqrt(x.shape[-1])
    # Not minus infinity: what neither sees must add zero, not NaN.
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min / 2).log_softmax(-1)


def _over_targets(values: Tensor, sequences: Sequences) -> Tensor:
    """Return the mean of ``(S, L)`` over a sequence's tokens, times its targets, summed."""
    mask = sequences.mask
    means = values.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    return (means * sequences.targets.to(means.dtype)).sum()
