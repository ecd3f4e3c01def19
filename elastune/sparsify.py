"""Zero the weights that matter least, and account for the zeros.

Every linear layer inside the blocks is pruned; embeddings and the head stay dense, as in Wanda's
and SparseGPT's papers. Calibrated methods go block by block through the blocks already pruned.

Shapes: `O` out features, `I` in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from elastune.calibrate import CalibrationBlock, Resident, always, calibration_blocks
from elastune.errors import BadRecipe
from elastune.hidden_states import States
from elastune.importance import (
    InputHessian,
    InputNorm,
    InputStatistic,
    magnitude_scores,
    sparsegpt_prune,
    wanda_scores,
)
from elastune.importance.base import zeros_per_row
from elastune.linears import in_features, weight_of
from elastune.models import architecture
from elastune.models.four_bit import unpacked

Method = Literal["magnitude", "wanda", "sparsegpt"]


@dataclass(frozen=True)
class Sparsity:
    """How much is zeroed: a share of each row, or n of every m consecutive weights of a row."""

    ratio: float
    n_of_m: tuple[int, int] | None = None

    @classmethod
    def parse(cls, ratio: float | None = None, pattern: str | None = None) -> Sparsity:
        """Read a ratio in [0, 1) or a pattern such as ``"2:4"`` (two zeros of every four).

        Raises:
            BadRecipe: out of range, not understood, or both given and in disagreement.
        """
        if pattern is not None:
            parts = pattern.split(":")
            if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
                raise BadRecipe(f"sparsity pattern {pattern!r} is not like '2:4' or '4:8'")
            n, m = int(parts[0]), int(parts[1])
            if not 0 < n < m:
                raise BadRecipe(f"sparsity pattern {pattern!r} must have 0 < n < m")
            if ratio is not None and ratio != n / m:
                raise BadRecipe(
                    f"sparsity ratio {ratio} and pattern {pattern!r} (= {n / m}) disagree",
                    try_="give one of them",
                )
            return cls(n / m, (n, m))
        if ratio is None or not 0 <= ratio < 1:
            raise BadRecipe(f"sparsity must be at least 0 and below 1, got {ratio}")
        return cls(float(ratio))

    def check(self, n_columns: int) -> None:
        """Raise BadRecipe where rows of ``n_columns`` weights cannot be cut into groups of m."""
        if self.n_of_m is not None and n_columns % self.n_of_m[1]:
            raise BadRecipe(
                f"rows of {n_columns} weights cannot be cut into groups of {self.n_of_m[1]}",
                try_="a pattern whose m divides the widths of the model, or a ratio",
            )


@torch.no_grad()
def keep_mask(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """Return the mask of kept weights: per row, exactly ``floor(I * ratio)`` are dropped.

    Args:
        scores: ``(O, I)``, larger = keep.
        sparsity: a share of each row, or n of each m neighbours.

    Returns:
        bool, ``(O, I)``.

    Raises:
        BadRecipe: rows cannot be cut into groups of m.
    """
    n_rows, n_columns = scores.shape
    sparsity.check(n_columns)
    if sparsity.n_of_m is not None:
        n, m = sparsity.n_of_m
        grouped = scores.reshape(n_rows, n_columns // m, m)
        dropped = grouped.topk(n, dim=2, largest=False).indices
        mask = torch.ones_like(grouped, dtype=torch.bool).scatter_(2, dropped, False)
        return mask.view(n_rows, n_columns)
    n_dropped = zeros_per_row(n_columns, sparsity.ratio)
    if n_dropped == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(n_dropped, dim=1, keepdim=True).values
    mask = scores > threshold
    # Ties at the threshold would drop too many: give the first of them back.
    excess = n_columns - n_dropped - mask.sum(dim=1)
    rows = excess.nonzero()[:, 0]
    if len(rows):  # coarse weights have ties in every row: none is looked at alone
        ties = scores[rows] == threshold[rows]
        first = ties.cumsum(dim=1, dtype=torch.int32) <= excess[rows, None]
        mask[rows] |= ties & first
    return mask


@torch.no_grad()
def sparsify_(
    model: PreTrainedModel,
    method: Method,
    sparsity: Sparsity,
    calibration: Tensor | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Zero weights of the linear layers in the model's blocks, in place.

    Args:
        model: of a known architecture.
        method: see `METHODS`.
        sparsity: how much.
        calibration: token ids ``(N, L)``, needed by all methods but magnitude.
        progress: called with (blocks done, blocks in all).

    Returns:
        Weight name -> bool mask of what was kept, ``(O, I)``, of `Conv1D` too.

    Raises:
        BadRecipe: unknown method, calibration missing, or rows that a pattern does not fit; the
            model is then as it was.
        UnsupportedModel: unknown family, or one that text cannot calibrate.
    """
    masks: dict[str, Tensor] = {}
    n_blocks = len(architecture(model).blocks_of(model))
    for index, found in enumerate(pruned_blocks(model, method, sparsity, calibration)):
        masks |= found
        if progress is not None:
            progress(index + 1, n_blocks)
    return masks


@torch.no_grad()
def pruned_blocks(
    model: PreTrainedModel,
    method: Method,
    sparsity: Sparsity,
    calibration: Tensor | None = None,
    *,
    resident: Resident = always,
    states: States | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Do what `sparsify_` does block by block, yielding each block's masks once it is pruned.

    Args:
        resident: of a streamed model: has a block's weights in memory until the next is asked for.
        states: where the hidden states between blocks are kept; in memory by default.

    Raises:
        BadRecipe: as `sparsify_`; nothing is changed then.
        UnsupportedModel: likewise.
    """
    if method not in METHODS:
        raise BadRecipe(f"unknown sparsifier {method!r}; known are {', '.join(METHODS)}")
    statistic, prune = METHODS[method]
    record = architecture(model)
    names = record.linear_names(model)
    for name in names:  # before the first weight is changed
        sparsity.check(in_features(model.get_submodule(name)))
    if statistic is None:
        for index, block in enumerate(record.block_names(model)):
            members = [name for name in names if name.startswith(f"{block}.")]
            with resident(index):
                yield {
                    f"{name}.weight": prune(model.get_submodule(name), None, sparsity)
                    for name in members
                }
        return
    if calibration is None:
        raise BadRecipe(f"{method} needs calibration text", try_="give it, or use magnitude")
    for stage in calibration_blocks(model, calibration, resident=resident, states=states):
        statistics = gather(stage, statistic)
        yield {
            f"{stage.name}.{record.roles[role]}.weight": prune(linear, statistics[role], sparsity)
            for role, linear in stage.linears.items()
        }


def gather(
    block: CalibrationBlock, statistic: Callable[[], InputStatistic]
) -> dict[str, InputStatistic]:
    """Run the block once, gathering one statistic for each input."""
    statistics: dict[str, InputStatistic] = {}

    def observe(roles: tuple[str, ...], x: Tensor) -> None:
        if roles[0] not in statistics:
            statistics.update(dict.fromkeys(roles, statistic()))
        statistics[roles[0]].add(x)

    block.observe(observe)
    return statistics


def _prune_magnitude(linear: Any, _: Any, sparsity: Sparsity) -> Tensor:
    weight = weight_of(linear)
    mask = keep_mask(magnitude_scores(weight), sparsity)
    weight.masked_fill_(~mask, 0)
    return mask


def _prune_wanda(linear: Any, inputs: Any, sparsity: Sparsity) -> Tensor:
    weight = weight_of(linear)
    mask = keep_mask(wanda_scores(weight, inputs), sparsity)
    weight.masked_fill_(~mask, 0)
    return mask


def _prune_sparsegpt(linear: Any, inputs: Any, sparsity: Sparsity) -> Tensor:
    weight = weight_of(linear)
    pruned, mask = sparsegpt_prune(weight, inputs, ratio=sparsity.ratio, n_of_m=sparsity.n_of_m)
    weight.copy_(pruned)
    return mask


METHODS: Mapping[str, tuple[Callable[[], InputStatistic] | None, Callable[..., Tensor]]] = {
    "magnitude": (None, _prune_magnitude),
    "wanda": (InputNorm, _prune_wanda),
    "sparsegpt": (InputHessian, _prune_sparsegpt),
}
"""Sparsifier -> (what it gathers about inputs, how it prunes a linear layer in place)."""


def sparsity_report(model: PreTrainedModel, *, method: str, sparsity: Sparsity) -> dict[str, Any]:
    """Count the exact zeros of every linear weight in the blocks: the content of sparsity.json."""
    tensors: dict[str, Any] = {}
    for name in architecture(model).linear_names(model):
        tensors[f"{name}.weight"] = zeros_of(model.get_submodule(name))
    return report_of(tensors, method=method, sparsity=sparsity)


def zeros_of(linear: Any) -> dict[str, Any]:
    """Return the row of sparsity.json of one linear layer."""
    weight = unpacked(linear.weight)
    zeros = int((weight == 0).sum())
    shape = list(weight.shape)
    return {"shape": shape, "zeros": zeros, "sparsity": zeros / weight.numel()}


def report_of(tensors: dict[str, Any], *, method: str, sparsity: Sparsity) -> dict[str, Any]:
    """Return the content of sparsity.json; weight name -> what `zeros_of` says of its layer."""
    zeros = sum(row["zeros"] for row in tensors.values())
    weights = sum(row["shape"][0] * row["shape"][1] for row in tensors.values())
    n_of_m = sparsity.n_of_m
    return {
        "schema": 1,
        "method": method,
        "ratio": sparsity.ratio,
        "pattern": None if n_of_m is None else f"{n_of_m[0]}:{n_of_m[1]}",
        "tensors": tensors,
        "total": {"zeros": zeros, "weights": weights, "sparsity": zeros / weights},
    }
