"""What a fit is asked for, and what it is planned from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from elastune.errors import BadRecipe
from elastune.search.limits import Limit, parse_limits
from elastune.sections.search import Cost

COSTS: tuple[str, ...] = get_args(Cost)


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        model: built-in name, hub id, folder or .gguf file.
        task: known task, or the user's own file.
        targets: limits on cost, such as ``"latency<=0.6x"``.
        max_drop: points of the task's first metric that may be lost against the same model tuned
            on the task without compression; 1.0 is a hundredth of a share. Of metrics of which less
            is better, such as perplexity, in their own unit.
        hours: time limit for everything.
        data: folder of local data sets.
        overrides: ``section.key=value`` for the recipe; what they set is not planned.

    Raises:
        BadRecipe: a number out of range, or a target that is none.
    """

    model: str
    task: str
    targets: tuple[str, ...]
    max_drop: float
    hours: float | None = None
    data: str | None = None
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_drop) and self.max_drop >= 0):
            raise BadRecipe(f"--max-drop is a number of points from 0 on, got {self.max_drop}")
        if self.hours is not None and not (math.isfinite(self.hours) and self.hours > 0):
            raise BadRecipe(f"--hours must be above 0, got {self.hours}")
        _ = self.limits

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The targets as limits."""
        found = parse_limits(list(self.targets))
        for limit in found:
            if limit.name in ("score", "loss", "error"):
                raise BadRecipe(
                    f"--target {limit}: targets are on cost; how much quality may be lost is "
                    "said by --max-drop",
                    try_="--max-drop POINTS for the quality, --target for costs alone",
                )
            if limit.name not in COSTS:
                raise BadRecipe(
                    f"--target {limit}: {limit.name} cannot be searched for; known are "
                    f"{', '.join(COSTS)}"
                )
            if limit.sign != "<=" or not limit.number > 0:
                raise BadRecipe(
                    f"--target {limit}: a target is an upper bound above 0",
                    try_='"latency<=0.6x" or "params<=10M"',
                )
        return tuple(found)

    @property
    def costs(self) -> tuple[str, ...]:
        """Names of the costs that are limited, each once."""
        return tuple(dict.fromkeys(limit.name for limit in self.limits))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, by which requests are compared."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


@dataclass(frozen=True)
class Facts:
    """What a plan needs to know of model, task and device.

    Attributes:
        kind: of the model.
        task_kind: how the task scores, such as ``"generation"``.
        n_train: training examples there are, those of validation among them.
        n_report: report examples.
        longest: tokens that the model can read.
        length: tokens that nearly all examples fit into.
        blocks: of the model.
        units: heads, or groups of heads, of the narrowest block, and its channels.
        hidden: width of the model.
        fixed_heads: whether some heads cannot be cut one by one.
        full: cost by name of the full model; latencies where a target is on them.
        halves: cost by name -> what all attention halves cost, and what all feed-forwards do.
        sparse_weights: weights of the blocks that sparsity can zero.
        per_rank: weights of an adapter of rank 1 on all of them.
        load_seconds: to load the model once.
    """

    kind: Literal["encoder", "decoder"]
    task_kind: str
    n_train: int
    n_report: int
    longest: int
    length: int
    blocks: int
    units: tuple[int, int]
    hidden: int
    fixed_heads: bool
    full: Mapping[str, float]
    halves: Mapping[str, tuple[float, float]]
    sparse_weights: int
    per_rank: int
    load_seconds: float = 0.0
