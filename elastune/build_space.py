"""Search spaces made from a model's structure and a few short patterns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedModel

from elastune.errors import InvalidSpace, UnsupportedModel, nearest
from elastune.models import architecture
from elastune.name_patterns import NamePatterns
from elastune.space import ElasticDim, SearchSpace

LORA_GROUPS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "up_gate": ("up", "gate"),
    "down": ("down",),
    "o": ("o",),
}
"""Roles that share one rank in each block (Shears): projections that read the same input. Of a
family that keeps them in one matrix that matrix is meant, here as among targets."""

FUSED: Mapping[str, tuple[str, ...]] = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
"""Roles of fused matrices -> the projections in them."""

DEFAULT_TARGETS = ("q", "k", "v", "up", "gate", "down")
"""Roles that get an adapter, as in the papers; add ``"o"`` for the attention output."""


def lora_space(
    model: PreTrainedModel,
    ranks: Sequence[int] | Mapping[str, Sequence[int]] = (32, 24, 16),
    *,
    targets: Sequence[str] = DEFAULT_TARGETS,
    groups: Mapping[str, Sequence[str]] | None = None,
    max_rank: int | None = None,
) -> SearchSpace:
    """Build one rank dim per block and group of projections.

    Dims are named ``layers.<block>.<group>``, such as ``layers.0.qkv``.

    Args:
        model: any model of a known architecture.
        ranks: choices for all dims, or a mapping from patterns over dim names to choices, such as
            ``{"*": [32, 24, 16], "*.down": [16, 8, 0], "layers.0.*": [32]}``; the last pattern
            that matches wins, and a dim that none matches gets no adapter. Rank 0 leaves the
            adapter out. Order and repeats do not matter.
        targets: roles that get an adapter. ``q``, ``k`` and ``v``, any of them, stand for a fused
            ``qkv`` where the family has one, ``gate`` and ``up`` for a fused ``gate_up``.
        groups: roles that share a rank, by the name of the group; default `LORA_GROUPS`. Targets in
            no group get a group of their own.
        max_rank: an upper bound that every rank must keep, the adapter's full rank.

    Raises:
        InvalidSpace: a rank out of range, a pattern that matches no dim, an unknown role.
        UnsupportedModel: the model has none of the targets.
    """
    record = architecture(model)
    grouped = _groups(groups or LORA_GROUPS, targets, _meanings(record.roles))
    patterns = NamePatterns(ranks)
    names = []
    dims = []
    held = record.linear_names(model)
    for index, block in enumerate(record.block_names(model)):
        for group, roles in grouped.items():
            places = (f"{block}.{record.roles[role]}" for role in roles if role in record.roles)
            modules = tuple(place for place in places if place in held)
            if not modules:
                continue
            name = f"layers.{index}.{group}"
            names.append(name)
            wanted = patterns.choices_of(name)
            if wanted is not None and (choices := _choices(name, wanted, max_rank)) != (0,):
                dims.append(ElasticDim(name, "rank", choices, modules))
    if patterns.unused and names:
        example = f"layers.0.{next(iter(grouped))}"
        raise InvalidSpace(
            f"adapter.ranks: {', '.join(map(repr, patterns.unused))} matches no dim; dims are "
            f"named like {example!r}, groups are {', '.join(grouped)}",
            try_=f"a pattern such as '*.{next(iter(grouped))}' or 'layers.0.*'",
        )
    if not dims:
        raise UnsupportedModel(
            f"{model.config.model_type} has no projection to adapt among the targets "
            f"{', '.join(targets)} with a rank above 0",
            try_=f"targets among {', '.join(record.roles)}",
        )
    return SearchSpace(dims)


def _meanings(roles: Iterable[str]) -> dict[str, str]:
    """Return every name that a target may have -> the role meant, which a family may lack."""
    meanings = {role: role for role in roles}
    for fused, parts in FUSED.items():
        if fused in meanings:
            meanings |= dict.fromkeys(parts, fused)
    return {"gate": "gate"} | meanings


def _groups(
    groups: Mapping[str, Sequence[str]], targets: Sequence[str], meanings: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Cut the groups down to the targets, and give the rest groups of their own."""
    for role in [*targets, *(role for roles in groups.values() for role in roles)]:
        if role not in meanings:
            raise InvalidSpace(
                f"unknown projection {role!r}{nearest(role, meanings)}; "
                f"this model has {', '.join(sorted(meanings))}"
            )
    wanted = _distinct(meanings[role] for role in targets)
    grouped = {
        name: tuple(role for role in _distinct(meanings[r] for r in roles) if role in wanted)
        for name, roles in groups.items()
    }
    placed = [role for roles in grouped.values() for role in roles]
    twice = sorted({role for role in placed if placed.count(role) > 1})
    if twice:
        fused = [f"{role} holds {', '.join(FUSED[role])}" for role in twice if role in FUSED]
        raise InvalidSpace(
            f"adapter.groups: {', '.join(twice)} stands in more than one group"
            + (f" (in this family {'; '.join(fused)})" if fused else ""),
            try_="each projection in one group of adapter.groups",
        )
    grouped |= {role: (role,) for role in wanted if role not in placed}
    return {name: roles for name, roles in grouped.items() if roles}


def _distinct(roles: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(roles))


def _choices(name: str, ranks: Sequence[int], max_rank: int | None) -> tuple[int, ...]:
    """Sort choices largest first and check their range."""
    choices = tuple(sorted(set(ranks), reverse=True))
    if not choices or choices[-1] < 0:
        raise InvalidSpace(f"{name}: ranks must be whole numbers of at least 0, got {list(ranks)}")
    if max_rank is not None and choices[0] > max_rank:
        raise InvalidSpace(
            f"{name}: rank {choices[0]} is above the adapter's full rank {max_rank}",
            try_=f"raise adapter.max_rank to {choices[0]} or lower adapter.ranks",
        )
    return choices
