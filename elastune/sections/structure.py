"""How the base is made sparse, and what of the model itself is elastic."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from elastune.sections.base import Section, listed
from elastune.sections.data import CalibrationConfig


class SparsifyConfig(Section):
    """How the base is made sparse."""

    method: Literal["wanda", "magnitude", "sparsegpt"] = "wanda"
    ratio: Annotated[float, Field(ge=0, lt=1)] | None = 0.5
    """Share of zeros in each row; 0 leaves the base dense."""
    pattern: str | None = None
    """"2:4" or "4:8": n zeros of every m weights; overrides ``ratio``."""
    calibration: CalibrationConfig = CalibrationConfig()
    stream: bool | Literal["auto"] = "auto"
    """Read, prune and write the base block by block, so that it is never in memory whole
    (docs/memory.md); "auto": where its weights would take more than half of the free memory. The
    result is the same."""
    choices: list[float] | dict[str, list[float]] = []
    """Shares of zeros to choose from, such as [0.0, 0.3, 0.5]: they are searched like ranks;
    for all layers, or patterns over dim names -> shares. ``ratio`` is then 0 unless given."""
    per: Literal["model", "layer", "half", "module"] = "layer"
    """What shares a choice: all blocks, a block, its attention or feed-forward, a linear layer."""

    @model_validator(mode="after")
    def _choices_leave_weights_as_they_are(self) -> SparsifyConfig:
        if self.choices and self.method == "sparsegpt":
            raise ValueError(
                "choices need method wanda or magnitude: sparsegpt changes the weights that stay, "
                "differently for every sparsity"
            )
        return self


_Sizes = list[float] | dict[str, list[float]]


class MovementConfig(Section):
    """How movement pruning learns its scores: a fine-tuning run of its own (EFTNAS)."""

    epochs: float = Field(6.0, gt=0)
    """Of the training examples; published: 30 for small sets, 6 for large ones, 8 for SQuAD."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps; overrides ``epochs``."""
    learning_rate: float = Field(2e-5, gt=0)
    score_learning_rate: float | None = Field(None, gt=0)
    """Of the scores; by default that of the weights, as published."""
    warmup: tuple[float, float] = (1 / 6, 1 / 2)
    """Parts of the training between which the threshold climbs to 0."""
    regularisation: float = Field(0.02, ge=0)
    """Weight of the pull of all scores below the threshold."""
    block_size: int = Field(32, ge=1)
    """Edge of the square blocks of attention weights that share a score."""


class ImportanceConfig(Section):
    """What says how much heads and channels matter, measured on training examples."""

    method: Literal["fisher", "taylor", "movement", "wanda", "magnitude"] = "fisher"
    """Fisher information of gates, in rounds; first order, |w dL/dw|, at once (taylor) or learned
    in a fine-tuning run (movement: the paper's); or without any loss."""
    examples: int = Field(512, ge=1)
    """Training examples that are looked at; movement pruning looks at all."""
    rounds: int = Field(16, ge=1)
    """Of fisher: how often what is left is scored anew, until the smallest sub-network."""
    tie: Literal["sum", "any"] = "any"
    """Of taylor and movement, which score single weights: what outlives a threshold has enough
    weight in sum, or any weight that does (the paper's)."""
    movement: MovementConfig = MovementConfig()


class GenerateConfig(Section):
    """A search space made from importance instead of by hand."""

    by: Literal["importance", "knapsack"] = "importance"
    """One threshold on all scores for each point; or, for each, the cuts that lose least by
    single-choice losses."""
    cost: Literal["macs", "params", "latency"] = "macs"
    """What points are spaced by, of the blocks."""
    low: float = Field(0.2, gt=0, le=1)
    """Cost of the smallest sub-network, as a part of the full model's."""
    high: float = Field(1.0, gt=0, le=1)
    """Cost of the largest one."""
    points: int | list[Annotated[float, Field(gt=0, le=1)]] = 5
    """How many equally spaced targets; or the targets themselves, instead of ``low`` and ``high``.
    """
    tolerance: float = Field(0.02, gt=0)
    """How far the cost of a point may be from its target."""
    per_cost: bool = False
    """Divide scores by the cost of what they stand for before they are compared."""
    discard: float = Field(0.02, ge=0, lt=1)
    """A half of a block that keeps less than this part of itself is left out instead."""

    @model_validator(mode="after")
    def _is_a_range(self) -> GenerateConfig:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        if self.by == "knapsack" and self.cost == "latency":
            raise ValueError("by: knapsack counts macs or params; latency is of by: importance")
        if self.points in (0, []) or (isinstance(self.points, int) and self.points < 1):
            raise ValueError(
                "points is a number of at least 1, or a list of parts such as [1, 0.5]"
            )
        return self

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest target."""
        if isinstance(self.points, list):
            return min(self.points), max(self.points)
        return self.low, self.high


class StructureConfig(Section):
    """What of the model itself is elastic: feed-forward width, heads, depth."""

    generate: GenerateConfig | None = None
    """Make the choices from importance; ``ffn``, ``heads`` and ``depth`` are then not given."""

    ffn: _Sizes | None = None
    """Choices of channels: parts of the full width (1.0, 0.5) or whole numbers; 0 leaves the
    feed-forward out. For all blocks, or patterns over dim names ("layers.0.*") -> choices."""
    heads: _Sizes | None = None
    """Choices of query heads, likewise; key/value groups go whole."""
    depth: Literal["all"] | list[int] | None = None
    """Numbers of the blocks that may be left out whole, or "all"."""
    embedding: list[float] | None = None
    """Choices of the rank of the word embedding, as parts of its width (docs/embeddings.md)."""
    round_to: int = Field(64, ge=1)
    """Parts of a width are rounded to multiples of this."""
    shared: bool = False
    """One choice for all blocks: every sub-network then loads with stock classes."""
    order: Literal["importance", "wanda", "taylor", "magnitude", "natural"] = "wanda"
    """What heads and channels are sorted by first, so that the part that is kept is the best; by
    the recipe's section ``importance`` where the space is made from it."""
    calibration: CalibrationConfig = CalibrationConfig(n_sequences=24, length=256)
    """Text that the order is measured on."""
    budgets: list[Annotated[float, Field(gt=0, le=1)]] = []
    """Parts of the blocks' MACs for which a sub-network is chosen, such as [0.85, 0.75]."""
    budget_slack: float = Field(0.02, ge=0)
    """Part of a budget by which the search's best for it may exceed it; points do, too."""
    allocation: Annotated[
        list[Literal["knapsack", "points", "uniform"]], BeforeValidator(listed)
    ] = ["knapsack"]
    """How: the choices whose losses, measured one by one, add up to least; the nearest point of a
    generated space; or equal cuts."""
    probes: int = Field(16, ge=1)
    """Validation examples that single choices are measured on."""
    format: Literal["auto", "hf", "hf-padded", "hf-hetero"] = "auto"
    """How sub-networks are saved (docs/exports.md)."""
    merge: bool = True
    """Add the adapter to the weights of what is saved and scored; with False it comes beside, which
    is the default where sparsity is searched."""

    @model_validator(mode="after")
    def _something_is_elastic(self) -> StructureConfig:
        by_hand = [n for n in ("ffn", "heads", "depth") if getattr(self, n) is not None]
        if self.generate is None:
            if not by_hand and self.embedding is None:
                raise ValueError("nothing is elastic: give ffn, heads or depth, or generate")
            if "points" in self.allocation:
                raise ValueError("allocation: points are those of a generated space; give generate")
            return self
        if by_hand or self.shared:
            raise ValueError(
                f"{', '.join(by_hand) or 'shared'} is of spaces made by hand, generate makes one"
            )
        if self.order != "importance":
            raise ValueError("a generated space keeps the best first: order must be importance")
        low, high = self.generate.range
        wrong = [b for b in self.budgets if not low - 1e-9 <= b <= high + 1e-9]
        if wrong:
            raise ValueError(
                f"budgets {', '.join(map(str, wrong))} are outside of the generated space, which "
                f"reaches from {low} to {high} of the full cost"
            )
        return self
