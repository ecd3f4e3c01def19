"""What a merge kept: zeros of the base, its INT4 grid, and the logits of the active sub-network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastune.elastic.linear import ElasticConv1D, ElasticLinear
from elastune.errors import ElastuneError
from elastune.export.verify import example_inputs
from elastune.linears import is_transposed
from elastune.subnetwork import Subnetwork
from elastune.supernet import SuperNetwork

_OUTPUTS = ("logits", "start_logits", "last_hidden_state")


@dataclass(frozen=True)
class MergeReport:
    """A merge that lost nothing.

    Attributes:
        base_zeros: zeros of the weights that have an adapter, before the merge.
        zeros: afterwards; more where a sum is zero.
        n_weights: of those weights.
        off_grid: numbers that are not on the INT4 grid; None where there is none.
        largest_difference: of a logit, merged against active.
        mean_difference: of all logits, absolute.
    """

    base_zeros: int
    zeros: int
    n_weights: int
    off_grid: int | None
    largest_difference: float
    mean_difference: float

    def __str__(self) -> str:
        grid = "" if self.off_grid is None else ", every weight on the INT4 grid"
        share = self.zeros / max(self.n_weights, 1)
        return (
            f"merged; all {self.base_zeros:,} zeros of the base kept, {self.zeros:,} of "
            f"{self.n_weights:,} weights are zero ({share:.2%}){grid}; logits differ from the "
            f"unmerged ones by {self.largest_difference:.1e} at most, "
            f"{self.mean_difference:.1e} on average"
        )


@torch.no_grad()
def merge_report(net: SuperNetwork, sub: Subnetwork) -> MergeReport:
    """Compare a merged sub-network with what is active in its super-network.

    Args:
        net: whose blocks are all there in ``sub``.
        sub: from `extract_model`, merged.

    Raises:
        ElastuneError: a zero of the base was lost, or a weight left its grid.
    """
    with net.active(sub.config):
        counts = [_counted(net, sub, name) for name in net.adapters]
        inputs = example_inputs(net.model)
        inputs = {n: t.to(net.model.device) for n, t in inputs.items()}
        active = _output(net.model, inputs)
    merged = _output(sub.model, inputs)
    lost = sum(row[2] for row in counts)
    if lost:
        raise ElastuneError(
            f"the merge lost {lost:,} zeros of the base", try_="keep='zeros' when it is trained"
        )
    off_grid = sum(row[4] for row in counts) if sub.grids else None
    if off_grid:
        raise ElastuneError(
            f"{off_grid:,} merged weights are not on the INT4 grid of the base",
            try_="the grids that quantise_ returned for this very base",
        )
    difference = (active - merged).abs()
    return MergeReport(
        base_zeros=sum(row[0] for row in counts),
        zeros=sum(row[1] for row in counts),
        n_weights=sum(row[3] for row in counts),
        off_grid=off_grid,
        largest_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
    )


def _counted(net: SuperNetwork, sub: Subnetwork, name: str) -> tuple[int, int, int, int, int]:
    """Return zeros before and after, zeros lost, weights, and weights off the grid."""
    base: Any = net.adapters[name].base
    is_elastic = isinstance(base, ElasticLinear | ElasticConv1D)
    before = base.active_weight() if is_elastic else base.weight
    before = before.T if is_transposed(base) and not is_elastic else before
    layer: Any = sub.model.get_submodule(name)
    after = layer.weight.T if is_transposed(layer) else layer.weight
    was, now = before == 0, after == 0
    off = 0
    if name in sub.grids:
        off = int((sub.grids[name].to(after.device).nearest(after) != after).sum())
    lost = int((was & ~now).sum())
    return int(was.sum()), int(now.sum()), lost, after.numel(), off


def _output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    was_training = model.training
    model.eval()
    found = model(**inputs)
    model.train(was_training)
    return next(found[name] for name in _OUTPUTS if name in found).float()
