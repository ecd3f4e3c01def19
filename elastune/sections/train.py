"""How adapters and weights train."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from elastune.sections.base import Section, listed


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
    keep: Literal["nothing", "zeros", "int4"] = "nothing"
    """What merging keeps of the base. "zeros": adapters act only where the base is not zero
    (SparsePEFT); "int4": and every sum is on the grid of the quantised base (QA-SparsePEFT). The
    sub-networks are then models of their own."""
    token_share: float = Field(0.25, gt=0, le=1)
    """Where something is kept: part of the tokens that gradients are estimated from. 1 is exact,
    and a step takes about 1.25 times that of a plain adapter (docs/merging.md)."""
    groups: dict[str, list[str]] | None = None
    """Projections that share a rank, by the group's name; by default qkv, up_gate, down, o."""


class QuantiseConfig(Section):
    """How the linear layers of the base's blocks become 4-bit numbers: on an INT4 grid that
    adapters can merge with (docs/merging.md), or packed in memory (docs/memory.md)."""

    method: Literal["gptq", "rtn", "nf4"] = "gptq"
    """"gptq": columns that are still to be rounded make up for those that were, on the calibration
    text of ``sparsify``; "rtn": to nearest. "nf4" (QLoRA; of method shears): packed by
    bitsandbytes, an eighth of float32 in memory, with adapters beside it."""
    group_size: int = Field(64, ge=2)
    """In features that share a scale and a zero point."""


def _by_method(value: Any) -> Any:
    """Let ``quantise: nf4`` stand for ``quantise: {method: nf4}``."""
    return {"method": value} if isinstance(value, str) else value


Quantise = Annotated[QuantiseConfig, BeforeValidator(_by_method)]

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
