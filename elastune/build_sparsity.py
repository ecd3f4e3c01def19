"""Sparsity as a choice: dims of kind ``density``, and the order in which weights leave.

Weights are ordered once, by scores. Every sparsity then leaves out the lowest of each row, exactly
those that `elastune.sparsify` zeroes at that ratio by the same scores: one byte a weight says up to
which choice it stays.

Source: the masks are Wanda's (Sun et al. 2023, per output row). Shears (Munoz et al. 2024) has one
sparsity for the whole model, chosen beforehand; here it is searched layer by layer.

Shapes: `N` calibration rows, `L` tokens a row, `O` out features, `I` in features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from elastune.artifacts import versions
from elastune.calibrate import calibration_blocks
from elastune.elastic.mask import DENSE, WeightLevels
from elastune.errors import BadArtifact, BadData, BadRecipe, InvalidSpace, nearest
from elastune.files import whole_file
from elastune.importance import InputNorm, magnitude_scores, wanda_scores
from elastune.linears import in_features, out_features, weight_of
from elastune.models.blocks import PARTS, blocks
from elastune.models.families import architecture
from elastune.name_patterns import NamePatterns
from elastune.space import ElasticDim, SearchSpace
from elastune.sparsify import Sparsity, keep_mask

Per = Literal["model", "layer", "half", "module"]
"""What shares one sparsity: all blocks, a block, its attention or feed-forward, a linear layer."""

Criterion = Literal["magnitude", "wanda"]

_FORMAT = "elastune-levels-1"


def sparsity_space(
    model: PreTrainedModel,
    sparsities: Sequence[float] | Mapping[str, Sequence[float]] = (0.0, 0.3, 0.5, 0.6),
    *,
    per: Per = "layer",
) -> SearchSpace:
    """Build dims over the sparsity of the linear layers in a model's blocks.

    Dims are named ``layers.<block>.density``, per half ``layers.<block>.heads.density`` and
    ``layers.<block>.ffn.density``, per module ``layers.<block>.<role>.density``, for the whole
    model ``layers.density``. Their choices are percentages of weights that stay, largest first:
    sparsity 0.3 is 70. Add them to a `lora_space` or `structure_space`.

    Args:
        model: of a known architecture; not changed.
        sparsities: parts of each row's weights that become zero, in whole percent, for all dims; or
            patterns over dim names -> parts, of which the last that matches wins. 0.0 is the layer
            as it is; it should be one of them. Order and repeats do not matter.
        per: what shares one sparsity.

    Raises:
        InvalidSpace: a sparsity out of range, a pattern that matches no dim, nothing to choose.
        UnsupportedModel: unknown family.
    """
    if per not in get_args(Per):
        raise InvalidSpace(
            f"sparsity per {per!r}{nearest(str(per), get_args(Per))}; "
            f"known are {', '.join(get_args(Per))}"
        )
    patterns = NamePatterns(sparsities)
    dims = []
    names = []
    for name, modules in _members(model, per).items():
        names.append(name)
        wanted = patterns.choices_of(name)
        if wanted is not None and (choices := _densities(name, wanted)) != (DENSE,):
            dims.append(ElasticDim(name, "density", choices, tuple(modules)))
    if patterns.unused:
        raise InvalidSpace(
            f"sparsity: {', '.join(map(repr, patterns.unused))} matches no dim; dims are named "
            f"like {names[0]!r}"
        )
    if not dims:
        raise InvalidSpace("no sparsity but 0 is a choice", try_="such as (0.0, 0.3, 0.5, 0.6)")
    return SearchSpace(dims)


def _members(model: PreTrainedModel, per: Per) -> dict[str, list[str]]:
    """Return the name of each dim -> the linear layers that follow it."""
    members: dict[str, list[str]] = {}
    held = architecture(model).linear_names(model)
    for block in blocks(model):
        place = f"layers.{block.index}"
        for part in PARTS:
            for role in block.roles_of(part):
                module = f"{block.name}.{block.record.roles[role]}"
                if module not in held:
                    continue  # of a half that is absent
                name = {
                    "model": "layers.density",
                    "layer": f"{place}.density",
                    "half": f"{place}.{part}.density",
                    "module": f"{place}.{role}.density",
                }[per]
                members.setdefault(name, []).append(module)
    return members


def _densities(name: str, sparsities: Sequence[float]) -> tuple[int, ...]:
    """Turn parts that become zero into percentages that stay, largest first."""
    found = set()
    for sparsity in sparsities:
        percent = round(100 * sparsity) if 0 <= sparsity < 1 else DENSE
        if percent == DENSE or abs(100 * sparsity - percent) > 1e-9:
            raise InvalidSpace(
                f"{name}: sparsity {sparsity} is no whole percentage of at least 0 and below 100",
                try_="parts such as 0.0, 0.3, 0.55",
            )
        found.add(DENSE - percent)
    if not found:
        raise InvalidSpace(f"{name}: no sparsities given", try_="such as (0.0, 0.3, 0.5, 0.6)")
    return tuple(sorted(found, reverse=True))


@torch.no_grad()
def sparsity_levels(
    model: PreTrainedModel,
    space: SearchSpace,
    scores: Mapping[str, Tensor] | Criterion,
    calibration: Tensor | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> WeightLevels:
    """Order the weights of all layers whose sparsity is a dim of the space.

    Do it once the model is as the super-network will have it: after `reorder_`, which moves
    weights, and after `sparsify_`, whose zeros stay.

    Args:
        model: of a known architecture, not yet elastic; not changed.
        space: dims of other kinds are passed over.
        scores: name of a weight -> ``(O, I)``, larger = keep, such as `taylor_scores` returns; or a
            criterion to score by. Wanda's is measured on the model as it is, where `sparsify_` sees
            each block behind blocks that are sparse already.
        calibration: token ids ``(N, L)``, needed by Wanda.
        progress: called with (weights done, weights in all).

    Returns:
        A byte for each weight, on the CPU.

    Raises:
        BadData: scores are missing, of another shape, or not numbers.
        BadRecipe: an unknown criterion, or calibration missing.
        InvalidSpace: no dim of the space is about sparsity.
        UnsupportedModel: a model that text cannot calibrate.
    """
    densities = {
        f"{name}.weight": tuple(choice for choice in dim.choices if choice != DENSE)
        for dim in space.dims
        if dim.kind == "density"
        for name in dim.modules
    }
    if not densities:
        raise InvalidSpace("the space has no dim of density", try_="sparsity_space(model)")
    levels: dict[str, Tensor] = {}
    for name, values in _scores(model, list(densities), scores, calibration):
        levels[name] = _levels(values, densities[name]).cpu()
        if progress is not None:
            progress(len(levels), len(densities))
    return WeightLevels({name: levels[name] for name in densities}, densities)


def _scores(
    model: PreTrainedModel,
    names: Sequence[str],
    scores: Mapping[str, Tensor] | Criterion,
    calibration: Tensor | None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the scores of weights; those of one block alone are alive where they are made here."""
    if isinstance(scores, Mapping):
        for name in names:
            yield name, _given(model, name, scores)
    elif scores == "magnitude":
        for name in names:
            yield name, magnitude_scores(_weight(model, name))
    elif scores != "wanda":
        raise BadRecipe(
            f"sparsity cannot be ordered by {scores!r}{nearest(str(scores), get_args(Criterion))}; "
            f"known are {', '.join(get_args(Criterion))}",
            try_="scores of any other criterion, as a mapping",
        )
    elif calibration is None:
        raise BadRecipe("wanda needs calibration text", try_="give it, or use magnitude")
    else:
        yield from _wanda(model, set(names), calibration)


def _given(model: PreTrainedModel, name: str, scores: Mapping[str, Tensor]) -> Tensor:
    """Return the scores of one weight out of a mapping, checked."""
    found = scores.get(name)
    if found is None:
        raise BadData(f"there are no scores of {name}{nearest(name, scores)}")
    layer = model.get_submodule(name.removesuffix(".weight"))
    shape = (out_features(layer), in_features(layer))
    if tuple(found.shape) != shape:
        raise BadData(
            f"{name}: scores of shape {tuple(found.shape)} for weights of shape {shape}",
            try_="scores of this very model",
        )
    if bool(found.isnan().any()):
        raise BadData(
            f"{name}: {int(found.isnan().sum())} scores are not a number",
            try_="other calibration batches; precision fp32 where a loss makes them",
        )
    return found


def _wanda(
    model: PreTrainedModel, names: set[str], calibration: Tensor
) -> Iterator[tuple[str, Tensor]]:
    roles = architecture(model).roles
    for block in calibration_blocks(model, calibration):
        norms: dict[str, InputNorm] = {}

        def observe(readers: tuple[str, ...], x: Tensor, norms: Any = norms) -> None:
            norm = norms.setdefault(readers[0], InputNorm())
            norms.update(dict.fromkeys(readers, norm))
            norm.add(x)

        block.observe(observe)
        for role, linear in block.linears.items():
            name = f"{block.name}.{roles[role]}.weight"
            if name in names:
                yield name, wanda_scores(weight_of(linear), norms[role])


def _weight(model: PreTrainedModel, name: str) -> Tensor:
    return weight_of(model.get_submodule(name.removesuffix(".weight")))


def _levels(scores: Tensor, densities: Sequence[int]) -> Tensor:
    """Return how many densities keep each weight, uint8 ``(O, I)``."""
    # The masks of keep_mask lie one in the other: each keeps the first of one fixed order.
    levels = torch.zeros(scores.shape, dtype=torch.uint8, device=scores.device)
    for density in densities:
        levels += keep_mask(scores, Sparsity((DENSE - density) / 100))
    return levels


def save_levels(path: str | Path, levels: WeightLevels, made_from: Mapping[str, Any]) -> None:
    """Write levels, whole or not at all.

    Args:
        path: of the file; what was there is replaced.
        levels: from `sparsity_levels`.
        made_from: criterion, model, data and what else led to them, as JSON can say it; the
            versions of the libraries are added under ``versions``.

    Raises:
        BadData: ``made_from`` holds what JSON cannot say.
    """
    try:
        told = json.dumps({"versions": versions(), **made_from})
    except (TypeError, ValueError) as error:
        raise BadData(
            f"what the levels were made from is not JSON: {error}",
            try_="strings, numbers, lists and mappings of them",
        ) from None
    densities = json.dumps({name: list(found) for name, found in levels.densities.items()})
    header = {"format": _FORMAT, "made_from": told, "densities": densities}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: found.cpu().contiguous() for name, found in levels.levels.items()}
    with whole_file(target) as partial:
        save_file(tensors, partial, metadata=header)


def load_levels(path: str | Path) -> tuple[WeightLevels, dict[str, Any]]:
    """Read what `save_levels` wrote: the levels, and what they were made from.

    Raises:
        BadArtifact: missing, damaged, or a file of another kind.
    """
    again = "delete it and run again to order the weights anew"
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise BadArtifact(f"{path} is missing", try_="run the stage that makes it") from None
    except (OSError, SafetensorError) as error:
        raise BadArtifact(f"the levels {path} cannot be read: {error}", try_=again) from error
    if header.get("format") != _FORMAT:
        raise BadArtifact(
            f"{path} holds no levels of weights: its format is {header.get('format')!r}, this "
            f"version reads {_FORMAT!r}",
            try_=again,
        )
    try:
        densities = {n: tuple(map(int, d)) for n, d in json.loads(header["densities"]).items()}
        made_from = dict(json.loads(header["made_from"]))
        if set(densities) != set(tensors):
            raise ValueError("levels and densities are of different weights")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadArtifact(
            f"the levels {path} cannot be read: {type(error).__name__}: {error}", try_=again
        ) from error
    return WeightLevels(tensors, densities), made_from
