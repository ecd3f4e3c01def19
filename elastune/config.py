"""Recipes: YAML files, overridden by ``section.key=value``, checked before anything is written.

A recipe is the whole description of a run. Defaults are the published settings where there are
some. No torch is imported here, so a bad recipe is refused at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from elastune.errors import BadRecipe, nearest
from elastune.yaml_text import dump_yaml, parse_yaml

BASELINES = ("dense", "dense+full", "dense+lora", "sparse", "sparse+lora")
_USUAL_BASELINES = {
    "shears": ["dense", "dense+lora", "sparse", "sparse+lora"],
    "finetune": ["dense", "dense+full", "dense+lora"],
}


_FILE_SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _shorthand(value: Any) -> Any:
    """Let ``task: gsm8k`` stand for ``task: {name: gsm8k}``."""
    return {"name": value} if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    """Let a single item, or a comma-separated string, stand for a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


class TaskConfig(_Section):
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


class DataConfig(_Section):
    """How the training side is cut. Report examples come from the tasks' own test sets."""

    dir: Path | None = None
    """Folder of local data sets; without it they come from the hub."""
    n_train: int | None = Field(None, ge=1)
    """Training examples; by default all that validation leaves."""
    n_validation: int = Field(64, ge=1)
    """Examples cut from the training side for the search."""
    leaks: Literal["refuse", "drop", "warn"] = "refuse"
    """What to do about training rows whose question is in a report set."""


class CalibrationConfig(_Section):
    """Text that sparsifiers look at. Packed: every sequence has full length."""

    source: str = "task"
    """"task" (training examples), "c4", or the path of a text file."""
    n_sequences: int = Field(128, ge=1)
    length: int = Field(2048, ge=2)
    """Tokens a sequence; at most what the model can read."""


class SparsifyConfig(_Section):
    """How the base is made sparse."""

    method: Literal["wanda", "magnitude", "sparsegpt"] = "wanda"
    ratio: Annotated[float, Field(ge=0, lt=1)] | None = 0.5
    """Share of zeros in each row; 0 leaves the base dense."""
    pattern: str | None = None
    """"2:4" or "4:8": n zeros of every m weights; overrides ``ratio``."""
    calibration: CalibrationConfig = CalibrationConfig()


class AdapterConfig(_Section):
    """The elastic low-rank adapter."""

    ranks: list[int] | dict[str, list[int]] = [32, 24, 16]
    """Choices for every dim, or patterns over dim names ("*.down", "layers.0.*") -> choices."""
    max_rank: int | None = Field(None, ge=1)
    """Upper bound that all ranks must keep."""
    alpha: float = Field(64, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    scaling: Literal["alpha/r_max", "alpha/r", "rslora"] = "alpha/r_max"
    targets: Annotated[list[str], BeforeValidator(_listed)] = ["q", "k", "v", "up", "gate", "down"]
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


class DistillConfig(_Section):
    """From which network sub-networks learn, besides or instead of the labels."""

    teacher: Literal["largest"] | None = None
    """"largest": the largest sub-network, as it is in the same step; null: only the labels."""
    weight: float = Field(1.0, gt=0, le=1)
    """Share of the teacher in the loss of those who learn from it; the rest is the labels'."""
    temperature: float = Field(1.0, gt=0)
    """What logits are divided by; the loss is multiplied by its square (Hinton et al., 2015)."""

    @model_validator(mode="after")
    def _has_a_teacher(self) -> DistillConfig:
        if self.teacher is None and (self.weight, self.temperature) != (1.0, 1.0):
            raise ValueError("weight and temperature say nothing without teacher: largest")
        return self


def _distillation(value: Any) -> Any:
    """Let ``distill: in_place`` stand for ``distill: {teacher: largest}``, and null for none."""
    if value is None or isinstance(value, str):
        value = {"teacher": value}
    elif isinstance(value, dict) and "name" in value and "teacher" not in value:
        # `--set train.distill.weight=0.5` makes a name of the shorthand that it finds.
        value = {"teacher" if key == "name" else key: value[key] for key in value}
    if isinstance(value, dict) and value.get("teacher") == "in_place":
        value = {**value, "teacher": "largest"}
    return value


class TrainConfig(_Section):
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
    report_to: Annotated[list[str], BeforeValidator(_listed)] = []
    """Trackers known to transformers, such as tensorboard or trackio."""
    seed: int | None = None
    """Of data order, adapters and draws; by default the recipe's."""


class SearchConfig(_Section):
    """How sub-adapters are looked for, on the validation examples."""

    algorithm: Literal["random"] = "random"
    trials: int = Field(12, ge=0)
    """Configurations to score; heuristic, largest and smallest are the first three."""
    objective: Literal["loss", "score"] = "loss"
    """Mean loss of the right answers, or the task's own metric."""


class EvaluateConfig(_Section):
    """What is measured for the report, and on what."""

    tasks: Annotated[list[Task], BeforeValidator(_listed)] = []
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


def _known_baselines(names: list[str]) -> list[str]:
    for name in names:
        if name not in BASELINES:
            raise ValueError(
                f"unknown baseline {name!r}{nearest(name, BASELINES)}; "
                f"known are {', '.join(BASELINES)}"
            )
    return list(dict.fromkeys(names))


class Recipe(_Section):
    """A whole run."""

    method: Literal["shears", "finetune"] = "shears"
    model: str
    """Built-in name, hub id, folder, or .gguf file."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False
    seed: int = 0
    task: Task
    data: DataConfig = DataConfig()
    sparsify: SparsifyConfig = SparsifyConfig()
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()
    search: SearchConfig = SearchConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    baselines: Annotated[list[str], BeforeValidator(_listed), AfterValidator(_known_baselines)] = []
    """What the results are compared with: untrained, all weights trained, or a plain LoRA, each as
    long as the super-adapter and on the same batches. By default those usual for the method."""

    @model_validator(mode="before")
    @classmethod
    def _usual_baselines(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("baselines") is None:
            method = data.get("method", "shears")
            return {**data, "baselines": _USUAL_BASELINES.get(method, [])}
        return data

    @property
    def only_scores(self) -> bool:
        """Whether the model is scored as it comes, so that no training data is needed."""
        return self.method == "finetune" and set(self.baselines) <= {"dense"}

    @property
    def report_tasks(self) -> list[TaskConfig]:
        """The tasks that the report scores."""
        return list(self.evaluate.tasks) or [self.task]


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply ``section.key=value`` overrides (values are YAML).

    Raises:
        BadRecipe: missing file, not YAML, unknown key (the nearest is named), value out of range.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRecipe(
            f"cannot read the recipe {path}: {error}", try_="a file of recipes/, or a path to one"
        ) from error
    try:
        data = parse_yaml(text)
    except yaml.YAMLError as error:
        raise BadRecipe(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise BadRecipe(f"{path} is not a recipe: it must be a YAML mapping of settings")
    for override in overrides:
        _apply(data, override)
    return make_recipe(data, str(path))


def make_recipe(data: Mapping[str, Any], source: str) -> Recipe:
    """Check the settings of a recipe.

    Raises:
        BadRecipe: with every mistake, one a line.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(item) for item in error.errors())
        raise BadRecipe(f"{source}: " + "\n  ".join(lines)) from None


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, with every default spelled out."""
    return dump_yaml(recipe.model_dump(mode="json"))


def _apply(data: dict[str, Any], override: str) -> None:
    """Set one dotted key."""
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise BadRecipe(f"--set {override!r} is not of the form section.key=value")
    *sections, last = key.strip().split(".")
    place = data
    for section in sections:
        inner = place.get(section)
        if isinstance(inner, str):  # a shorthand such as `task: gsm8k`
            inner = {"name": inner}
        if inner is not None and not isinstance(inner, dict):
            raise BadRecipe(f"--set {override!r}: {section!r} has no keys of its own")
        place[section] = inner = dict(inner or {})
        place = inner
    try:
        place[last] = parse_yaml(value)
    except yaml.YAMLError as error:
        raise BadRecipe(f"--set {override!r}: the value is not valid YAML") from error


def _explain(item: Any) -> str:
    """Say one validation error in the user's words."""
    place = [part for part in item["loc"] if part not in _UNION_TAGS]
    key = ".".join(str(part) for part in place)
    if item["type"] == "extra_forbidden":
        known = _keys_at(place[:-1])
        hint = nearest(str(place[-1]), known)
        return f"unknown key {key!r}{hint}; known here are {', '.join(known)}"
    if item["type"] == "missing":
        return f"{key!r} is missing"
    if item["type"] == "value_error":
        return f"{key}: {item['ctx']['error']}"
    return f"{key}: {item['msg'].lower()}, got {item['input']!r}"


_UNION_TAGS = ("list[int]", "dict[str,list[int]]")


def _keys_at(place: Iterable[Any]) -> list[str]:
    """Return the keys of the section at a place in the recipe."""
    model: Any = Recipe
    for part in place:
        if isinstance(part, int) or not hasattr(model, "model_fields"):
            continue
        annotation = model.model_fields[part].annotation
        inner = [annotation, *getattr(annotation, "__args__", ())]
        found = [kind for kind in inner if hasattr(kind, "model_fields")]
        model = found[0] if found else TaskConfig
    return list(model.model_fields)
