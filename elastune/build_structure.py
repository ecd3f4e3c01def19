"""Search spaces over a model's own structure: heads, feed-forward widths, depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from transformers import PreTrainedModel

from elastune.elastic.embedding import check_ranks, input_embedding
from elastune.errors import InvalidSpace
from elastune.models.blocks import Block, Part, blocks
from elastune.name_patterns import NamePatterns
from elastune.space import ElasticDim, SearchSpace
from elastune.structure import check_choices, full_size

Sizes = Sequence[float] | Mapping[str, Sequence[float]]
"""Choices for all blocks, or patterns over dim names -> choices; the last that matches wins."""


def structure_space(
    model: PreTrainedModel,
    *,
    ffn: Sizes | None = None,
    heads: Sizes | None = None,
    depth: Literal["all"] | Sequence[int] | None = None,
    embedding: Sequence[float] | None = None,
    round_to: int = 64,
    shared: bool = False,
) -> SearchSpace:
    """Build one dim per block for each of widths, heads and depth (LoNAS, section 3).

    Dims are named ``layers.<block>.ffn``, ``layers.<block>.heads`` and ``layers.<block>.block``.
    Add them to a `lora_space` for ranks and structure together.

    Args:
        model: of a known architecture; not changed.
        ffn: choices of channels: parts of the full width (1.0, 0.5) or whole numbers of at least 2.
            0 leaves the feed-forward out. Order and repeats do not matter.
        heads: choices of query heads, likewise; key/value heads follow, so that parts are rounded
            to whole groups. 0 leaves the attention out.
        depth: numbers of the blocks that may be left out whole; ``"all"`` for any of them that the
            family can do without.
        embedding: choices of the rank of the word embedding, one dim named ``embeddings.rank``:
            parts of its width, rounded to multiples of 8, or whole ranks of at least 2. 1.0, the
            width itself, is the table as it is; it should be one of them. Models whose output head
            is tied to the embedding are refused.
        round_to: parts of a width are rounded to multiples of this.
        shared: one dim for all blocks instead: every sub-network is uniform, and so loads with
            stock classes. ``depth`` stays per block.

    Raises:
        InvalidSpace: nothing is elastic, a pattern that matches no dim, or sizes a block cannot
            have.
        UnsupportedModel: unknown family.
    """
    if round_to < 1:
        raise InvalidSpace(f"round_to must be at least 1, got {round_to}")
    found = blocks(model)
    dims = []
    wanted: tuple[tuple[Part, Sizes | None], ...] = (("heads", heads), ("ffn", ffn))
    for part, sizes in wanted:
        if sizes is not None:
            members = [found] if shared else [[block] for block in found]
            dims += _part_dims(part, sizes, members, round_to)
    dims += _depth_dims(depth, found)
    if embedding is not None:
        dims += _embedding_dims(model, embedding)
    if not dims:
        raise InvalidSpace(
            "nothing of the structure is elastic",
            try_="ffn=[1.0, 0.75, 0.5], heads=..., depth=... or embedding=...",
        )
    return SearchSpace(sorted(dims, key=lambda dim: _place(dim.name)))


def _place(name: str) -> tuple[int, str]:
    """Sort dims by block; dims shared by all blocks come first."""
    number = name.split(".")[1]
    return (int(number), "") if number.isdigit() else (-1, number)


def _part_dims(
    part: Part, sizes: Sizes, groups: Sequence[Sequence[Block]], round_to: int
) -> list[ElasticDim]:
    """Return the dims of widths or of heads, one for each group of blocks."""
    patterns = NamePatterns(sizes)
    dims = []
    for members in groups:
        block = members[0]
        name = f"layers.{part}" if len(members) > 1 else f"layers.{block.index}.{part}"
        wanted = patterns.choices_of(name)
        if wanted is None:
            continue
        choices = _choices(name, part, wanted, block, round_to)
        if choices == (full_size(block, part),):
            continue
        for other in members:
            check_choices(name, part, choices, other)
        modules = [f"{b.name}.{b.record.roles[role]}" for b in members for role in b.roles_of(part)]
        dims.append(ElasticDim(name, part, choices, tuple(modules)))
    if patterns.unused:
        raise InvalidSpace(
            f"{part}: {', '.join(map(repr, patterns.unused))} matches no dim; dims are named like "
            f"'layers.0.{part}'"
        )
    return dims


def _choices(
    name: str, part: Part, sizes: Sequence[float], block: Block, round_to: int
) -> tuple[int, ...]:
    """Turn parts into whole sizes, largest first."""
    unit = block.heads_per_unit if part == "heads" else round_to
    return _whole_sizes(name, sizes, full_size(block, part), unit)


def _whole_sizes(name: str, sizes: Sequence[float], full: int, unit: int) -> tuple[int, ...]:
    """Turn parts of a full size into whole sizes, largest first.

    Raises:
        InvalidSpace: no sizes, or one that is neither a part nor whole.
    """
    found = set()
    for size in sizes:
        if size < 0:
            raise InvalidSpace(f"{name}: sizes cannot be negative, got {size}")
        if size == 0:
            found.add(0)
        elif size <= 1:
            found.add(min(full, max(unit, round(size * full / unit) * unit)) if size < 1 else full)
        elif size != int(size):
            raise InvalidSpace(
                f"{name}: {size} is neither a part of the full size (at most 1) nor whole"
            )
        else:
            found.add(int(size))
    if not found:
        raise InvalidSpace(f"{name}: no sizes given", try_="such as [1.0, 0.75, 0.5]")
    return tuple(sorted(found, reverse=True))


_RANK_STEP = 8
"""Parts of an embedding's width are rounded to multiples of this."""


def _embedding_dims(model: PreTrainedModel, sizes: Sequence[float]) -> list[ElasticDim]:
    """Return the dim of the word embedding's rank; none where its width is the only choice."""
    name = "embeddings.rank"
    module, table = input_embedding(model)
    width = table.embedding_dim
    choices = _whole_sizes(name, sizes, width, min(_RANK_STEP, width))
    check_ranks(name, choices, table)
    return [] if choices == (width,) else [ElasticDim(name, "embedding", choices, (module,))]


def _depth_dims(
    depth: Literal["all"] | Sequence[int] | None, found: Sequence[Block]
) -> list[ElasticDim]:
    """Return a dim for each block that may be left out."""
    if depth is None:
        return []
    if isinstance(depth, str) and depth != "all":
        raise InvalidSpace(
            f"depth is 'all' or a list of block numbers, got {depth!r}",
            try_='depth="all", or depth=[8, 9]',
        )
    if depth == "all":
        numbers = [block.index for block in found if block.fixed_depth is None]
        if not numbers:
            check_choices("depth", "depth", (1, 0), found[0])
    else:
        numbers = sorted({int(number) for number in depth})
    wrong = [number for number in numbers if not 0 <= number < len(found)]
    if wrong:
        raise InvalidSpace(f"depth: there is no block {wrong}; blocks are 0 to {len(found) - 1}")
    for number in numbers:
        check_choices(f"layers.{number}.block", "depth", (1, 0), found[number])
    return [
        ElasticDim(f"layers.{number}.block", "depth", (1, 0), (found[number].name,))
        for number in numbers
    ]
