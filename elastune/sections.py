"""The sections of a recipe. Defaults are the published settings where there are some."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

_FILE_SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet")


class Section(BaseModel):
    """Settings that are refused when they are unknown, and never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _shorthand(value: Any) -> Any:
    """Let ``task: gsm8k`` stand for ``task: {name: gsm8k}``."""
    return {"name": value} if isinstance(value, str) else value


def listed(value: Any) -> Any:
    """Let a single item, or a comma-separated string, stand for a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


class TaskConfig(Section):
    """A benchmark or a data set of the user's own."""

    name: str
    """A known task (``elastune doctor`` lists them), or the path of a .jsonl or .txt file."""
    template: str | None = None
    """How questions are worded: alpaca, qa, chat, none; by default the task's own."""
    limit: int | None = Field(None, ge=1)
    """Score at most this many report examples (drawn once, by a fixed seed)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The task's own options."""

    @property
    def label(self) -> str:
        """What results call the task: its name, of a file without the folders."""
        path = self.name.rpartition(":")[2]
        is_file = Path(path.removesuffix(".gz")).suffix in _FILE_SUFFIXES
        return Path(path).name if is_file else self.name


Task = Annotated[TaskConfig, BeforeValidator(_shorthand)]


class DataConfig(Section):
    """How the training side is cut. Report examples come from the tasks' own test sets."""

    dir: Path | None = None
    """Folder of local data sets; without it they come from the hub."""
    n_train: int | None = Field(None, ge=1)
    """Training examples; by default all that validation leaves."""
    n_validation: int = Field(64, ge=1)
    """Examples cut from the training side for the search."""
    leaks: Literal["refuse", "drop", "warn"] = "refuse"
    """What to do about training rows whose question is in a report set."""


class CalibrationConfig(Section):
    """Text that sparsifiers look at. Packed: every sequence has full length."""

    source: str = "task"
    """"task" (training examples), "c4", or the path of a text file."""
    n_sequences: int = Field(128, ge=1)
    length: int = Field(2048, ge=2)
    """Tokens a sequence; at most what the model can read."""


class SparsifyConfig(Section):
    """How the base is made sparse."""

    method: Literal["wanda", "magnitude", "sparsegpt"] = "wanda"
    ratio: Annotated[float, Field(ge=0, lt=1)] | None = 0.5
    """Share of zeros in each row; 0 leaves the base dense."""
    pattern: str | None = None
    """"2:4" or "4:8": n zeros of every m weights; overrides ``ratio``."""
    calibration: CalibrationConfig = CalibrationConfig()


class AdapterConfig(Section):
    """The elastic low-rank adapter."""

    ranks: list[int] | dict[str, list[int]] = [32, 24, 16]
    """Choices for every dim, or patterns over dim names ("*.down", "layers.0.*") -> choices. Empty
    for no adapter at all, where the model's structure is elastic and all its weights train."""
    max_rank: int | None = Field(None, ge=1)
    """Upper bound that all ranks must keep."""
    alpha: float = Field(64, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    scaling: Literal["alpha/r_max", "alpha/r", "rslora"] = "alpha/r_max"
    targets: Annotated[list[str], BeforeValidator(listed)] = ["q", "k", "v", "up", "gate", "down"]
    groups: dict[str, list[str]] | None = None
    """Projections that share a rank, by the group's name; by default qkv, up_gate, down, o."""


Schedule = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_restarts",
]


LARGEST = "largest"
"""The teacher that is the largest sub-network itself."""


class DistillConfig(Section):
    """From which network to learn besides or instead of the labels (docs/distillation.md)."""

    teacher: Annotated[str, Field(min_length=1)] | None = None
    """"largest": the largest sub-network, as it is in the same step; or an outside teacher, that
    teaches the largest, too: the name of a trained baseline such as "dense+full", or a checkpoint.
    Null: only the labels."""
    weight: float = Field(1.0, gt=0, le=1)
    """Share of the teacher in the loss of those who learn from it; the rest is the labels'. Of an
    outside teacher 0.9 unless given (EFTNAS)."""
    temperature: float = Field(1.0, gt=0)
    """What logits are divided by; the loss is multiplied by its square (Hinton et al., 2015). Of an
    outside teacher 2 unless given (EFTNAS)."""
    hidden: float = Field(0.0, ge=0)
    """Weight of the mean squared distance to the teacher's last hidden states."""
    relations: float = Field(0.0, ge=0)
    """Weight of the divergence from the teacher's relations between tokens in its last attention
    (MiniLMv2; Wang et al., 2021)."""

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("teacher") in (None, LARGEST):
            return data
        if data["teacher"] == "in_place":
            return {**data, "teacher": LARGEST}
        return {"weight": 0.9, "temperature": 2.0, **data}

    @model_validator(mode="after")
    def _has_a_teacher(self) -> DistillConfig:
        fields = type(self).model_fields.items()
        given = [name for name, field in fields if getattr(self, name) != field.default]
        if self.teacher is None and given:
            raise ValueError(f"{given[0]} says nothing without a teacher, such as {LARGEST}")
        return self

    @property
    def has_outside_teacher(self) -> bool:
        """Whether the teacher is another network than the one that trains."""
        return self.teacher not in (None, LARGEST)

    @property
    def needs_features(self) -> bool:
        """Whether more than the teacher's logits is learnt from."""
        return self.hidden > 0 or self.relations > 0


def _distillation(value: Any) -> Any:
    """Let ``distill: in_place`` stand for ``distill: {teacher: largest}``, and null for none."""
    if value is None or isinstance(value, str):
        value = {"teacher": value}
    elif isinstance(value, dict) and "name" in value and "teacher" not in value:
        # `--set train.distill.weight=0.5` makes a name of the shorthand that it finds.
        value = {"teacher" if key == "name" else key: value[key] for key in value}
    return value


class TrainConfig(Section):
    """How long, how fast and how to train. Defaults are those of the Shears paper's runs."""

    epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps; overrides ``epochs``."""
    batch_size: int = Field(16, ge=1)
    """Sequences in a micro-batch, laid end to end without padding."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches in an optimizer step."""
    learning_rate: float = Field(3e-4, gt=0)
    """Of adapters and of what else a method trains."""
    full_learning_rate: float = Field(3e-5, gt=0)
    """Of all weights: with ``update: full``, and of the baselines called "+full"."""
    update: Literal["adapter", "full"] = "adapter"
    """What of a super-network trains: its adapters (the base stays as it is), or every weight."""
    schedule: Schedule = "cosine"
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate climbs from 0."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    max_length: int = Field(512, ge=2)
    """Tokens; longer examples are cut, those without room for a completion left out."""
    sampler: Literal["random", "sandwich", "progressive"] = "random"
    n_random: int = Field(1, ge=0)
    """Random sub-networks in a step of the sandwich, besides the largest and the smallest."""
    distill: Annotated[DistillConfig, BeforeValidator(_distillation)] = DistillConfig()
    """``in_place``: the other sub-networks of a sandwich learn from the largest."""
    draw_per: Literal["step", "micro_batch"] = "step"
    """When a new sub-network is drawn; the papers' code draws one per micro-batch."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """"auto" is bf16 autocast where a GPU has it, else float32."""
    gradient_checkpointing: bool = False
    checkpoint_every: int = Field(50, ge=1)
    """Optimizer steps between checkpoints that a killed run goes on from."""
    report_to: Annotated[list[str], BeforeValidator(listed)] = []
    """Trackers known to transformers, such as tensorboard or trackio."""
    seed: int | None = None
    """Of data order, adapters and draws; by default the recipe's."""


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
    """Add the adapter to the weights of what is saved and scored; with False it comes beside."""

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


class SearchConfig(Section):
    """How sub-networks are looked for, on the validation examples."""

    algorithm: Literal["random", "hill_climb"] = "random"
    """Uniform draws; or neighbours of the best of every size that were found so far, so that one
    search serves many budgets."""
    trials: int = Field(12, ge=0)
    """Configurations to score; heuristic, largest and smallest come before those of the algorithm.
    """
    objective: Literal["loss", "score"] = "loss"
    """Mean loss of the right answers, or the task's own metric."""
    cost: Literal["params", "nonzero", "macs", "block_macs"] = "params"
    """What is minimised beside it; MACs are of a pass over ``evaluate.macs_length`` tokens, block
    MACs those without embedding and head."""


class EvaluateConfig(Section):
    """What is measured for the report, and on what."""

    tasks: Annotated[list[Task], BeforeValidator(listed)] = []
    """Benchmarks to report; by default the training task's own."""

    @field_validator("tasks")
    @classmethod
    def _differ(cls, tasks: list[TaskConfig]) -> list[TaskConfig]:
        labels = [task.label for task in tasks]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two tasks are called {label!r}; results could not tell them")
        return tasks

    batch_tokens: int = Field(8192, ge=1)
    """Tokens in one batch; lower it when memory runs out."""
    macs_length: int = Field(256, ge=1)
    """Tokens of the forward pass that MACs are counted for."""
    latency: bool = False
    """Measure the latency of that forward pass on this device, too."""
