"""Recipes: YAML files, overridden by ``section.key=value``, checked before anything is written.

A recipe is the whole description of a run; `elastune.sections` has its parts. No torch is imported
here, so a bad recipe is refused at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from elastune.errors import BadRecipe, nearest
from elastune.sections import (
    AdapterConfig,
    CalibrationConfig,
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    GenerateConfig,
    ImportanceConfig,
    MovementConfig,
    Quantise,
    QuantiseConfig,
    SearchConfig,
    Section,
    SparsifyConfig,
    StructureConfig,
    Task,
    TaskConfig,
    TrainConfig,
    listed,
)
from elastune.yaml_text import dump_yaml, parse_yaml

__all__ = [
    "BASELINES",
    "AdapterConfig",
    "CalibrationConfig",
    "DataConfig",
    "DistillConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "ImportanceConfig",
    "MovementConfig",
    "QuantiseConfig",
    "Recipe",
    "SearchConfig",
    "SparsifyConfig",
    "StructureConfig",
    "TaskConfig",
    "TrainConfig",
    "apply_override",
    "dump_recipe",
    "load_recipe",
    "make_recipe",
]

BASELINES = ("dense", "dense+full", "dense+lora", "sparse", "sparse+lora", "alone")
_USUAL_BASELINES = {
    "shears": ["dense", "dense+lora", "sparse", "sparse+lora"],
    "lonas": ["dense", "dense+lora"],
    "eftnas": ["dense+full", "alone"],
    "sqft": ["dense", "dense+lora", "sparse", "sparse+lora"],
    "finetune": ["dense", "dense+full", "dense+lora"],
}


_OF_STRUCTURE = ("lonas", "eftnas")
"""Methods whose search space cuts the model itself."""


def _as_published(data: dict[str, Any]) -> dict[str, Any]:
    """Fill in what EFTNAS is where a recipe does not say otherwise."""
    distill: Any = {"teacher": "dense+full"}
    usual: dict[str, Any] = {"update": "full", "sampler": "sandwich", "distill": distill}
    given = {name: data.get(name) or {} for name in ("train", "structure", "adapter")}
    if not all(isinstance(section, dict) for section in given.values()):
        return data  # refused with the name of the section
    train = usual | given["train"]
    structure: dict[str, Any] = {"order": "importance"} | given["structure"]
    adapter: dict[str, Any] = {"ranks": []} | given["adapter"]
    if structure["order"] == "importance" and data.get("importance") is None:
        data = {**data, "importance": {}}
    return {**data, "train": train, "structure": structure, "adapter": adapter}


def _keeping(data: dict[str, Any]) -> dict[str, Any]:
    """Fill in what SQFT is: adapters that merge without losing a zero, nor the grid of the base."""
    given = data.get("adapter") or {}
    if not isinstance(given, dict):
        return data
    adapter: dict[str, Any] = {"keep": "zeros"} | given
    if adapter["keep"] == "int4" and data.get("quantise") is None:
        data = {**data, "quantise": {}}
    return {**data, "adapter": adapter}


def _known_baselines(names: list[str]) -> list[str]:
    for name in names:
        if name not in BASELINES:
            raise ValueError(
                f"unknown baseline {name!r}{nearest(name, BASELINES)}; "
                f"known are {', '.join(BASELINES)}"
            )
    return list(dict.fromkeys(names))


class Recipe(Section):
    """A whole run."""

    method: Literal["shears", "lonas", "eftnas", "sqft", "finetune"] = "shears"
    model: str
    """Built-in name, hub id, folder, or .gguf file."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False
    seed: int = 0
    task: Task
    data: DataConfig = DataConfig()
    start: Literal["model", "dense+full"] = "model"
    """What the super-network's base begins as: the model as it comes, or all its weights trained
    on the task first."""
    vocabulary: Literal["whole", "task"] = "whole"
    """"task": only tokens of the training examples (and single characters) stay, in all systems."""
    sparsify: SparsifyConfig = SparsifyConfig()
    quantise: Quantise | None = None
    """Make the base 4-bit once it is sparse; by default an INT4 grid where adapter.keep is int4."""
    importance: ImportanceConfig | None = None
    """Only of methods that order heads and channels by it, or make the search space from it."""
    structure: StructureConfig | None = None
    """Only of methods that make the model itself elastic."""
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()
    search: SearchConfig = SearchConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    baselines: Annotated[list[str], BeforeValidator(listed), AfterValidator(_known_baselines)] = (
        Field(default_factory=list)
    )
    """What the results are compared with: untrained, all weights trained, or a plain LoRA, each as
    long as the super-adapter and on the same batches. By default those usual for the method."""

    @model_validator(mode="before")
    @classmethod
    def _usual_of_the_method(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        method = data.get("method", "shears")
        if data.get("baselines") is None:
            usual = _USUAL_BASELINES.get(method, []) if isinstance(method, str) else []
            structure = data.get("structure")
            if not isinstance(structure, dict) or not structure.get("budgets"):
                usual = [name for name in usual if name != "alone"]
            data = {**data, "baselines": usual}
        sparse = data.get("sparsify") or {}
        if not isinstance(sparse, dict):
            return data
        # Where something else is searched the base is dense unless a recipe says otherwise.
        elsewhere = method in _OF_STRUCTURE or sparse.get("choices")
        if elsewhere and not {"ratio", "pattern"} & set(sparse):
            data = {**data, "sparsify": {**sparse, "ratio": 0.0}}
        data = data if method != "eftnas" else _as_published(data)
        data = data if method != "sqft" else _keeping(data)
        structure = data.get("structure")
        if sparse.get("choices") and isinstance(structure, dict):
            data = {**data, "structure": {"merge": False} | structure}
        return data

    @model_validator(mode="after")
    def _structure_fits_the_method(self) -> Recipe:
        if self.method in _OF_STRUCTURE and self.structure is None:
            raise ValueError(
                f"method {self.method} needs a section 'structure', such as "
                "{ffn: [1.0, 0.75, 0.5]}"
            )
        if self.method not in _OF_STRUCTURE and self.structure is not None:
            raise ValueError(
                f"method {self.method} has no section 'structure'; use method: lonas or eftnas"
            )
        ordered = self.structure is not None and self.structure.order == "importance"
        if ordered and self.importance is None:
            raise ValueError(
                "structure.order=importance needs a section 'importance', such as {method: taylor}"
            )
        if self.importance is not None and not ordered:
            raise ValueError("the section 'importance' is of use with structure.order=importance")
        self._check_packed()
        self._check_keep()
        self._check_stream()
        if self.structure is None and not self.adapter.ranks:
            raise ValueError("adapter.ranks is empty, so that there is nothing to train")
        if not self.adapter.ranks and self.train.update == "adapter":
            raise ValueError("adapter.ranks is empty: set train.update=full to train the weights")
        if self.train.distill.teacher == "largest" and self.train.sampler != "sandwich":
            raise ValueError("train.distill needs train.sampler=sandwich, which trains the teacher")
        if self.baselines.count("alone") and not (self.structure and self.structure.budgets):
            raise ValueError("baseline 'alone' is of structure.budgets, and there are none")
        named = {self.start, self.train.distill.teacher or ""} & {"dense+full", "dense+lora"}
        for name in sorted(named - set(self.baselines)):
            raise ValueError(f"{name} is to be trained, so that baselines must name it")
        return self

    def _check_keep(self) -> None:
        """Raise ValueError unless merging can keep what the recipe wants."""
        keep = self.adapter.keep
        if self.packs_base:
            return
        if self.quantise is not None and self.method != "sqft":
            raise ValueError(f"method {self.method} has no section 'quantise'; use method: sqft")
        if keep == "nothing" and self.quantise is None:
            return
        if self.method != "sqft":
            raise ValueError(f"adapter.keep={keep} is of method: sqft, this is {self.method}")
        if (keep == "int4") != (self.quantise is not None):
            raise ValueError("a quantised base needs adapter.keep=int4, and that a quantised base")
        if self.adapter.dropout > 0:
            raise ValueError(
                f"adapter.keep={keep} trains merged weights: adapter.dropout must be 0"
            )
        if self.train.update == "full":
            raise ValueError(f"adapter.keep={keep} is of adapters: train.update must be adapter")
        if self.sparsify.choices:
            raise ValueError(f"adapter.keep={keep} needs one sparsity: leave sparsify.choices out")

    def _check_packed(self) -> None:
        """Raise ValueError unless all that the recipe wants can be done with a 4-bit base."""
        if not self.packs_base:
            return
        if self.method != "shears":
            raise ValueError(
                f"quantise.method=nf4 packs the base's weights, which method {self.method} would "
                "cut, train or merge with; use method: shears, whose adapters stand beside them"
            )
        if self.sparsify.choices:
            raise ValueError("packed weights cannot be masked: leave sparsify.choices out")
        if self.train.update == "full":
            raise ValueError("packed weights cannot train: train.update must be adapter")
        if self.adapter.keep != "nothing":
            raise ValueError("adapters cannot merge with packed weights: leave adapter.keep out")

    def _check_stream(self) -> None:
        """Raise ValueError where a base is to be streamed that something else needs whole."""
        if self.sparsify.stream is True and self.unstreamed is not None:
            what = f"{self.unstreamed} needs the base in memory whole"
            raise ValueError(f"sparsify.stream=true: {what}; leave one of them out")

    @property
    def packs_base(self) -> bool:
        """Whether the base's weights are packed in 4 bits."""
        return self.quantise is not None and self.quantise.method == "nf4"

    @property
    def unstreamed(self) -> str | None:
        """What of the recipe keeps its base from being made block by block, if anything."""
        structure = self.structure
        found = {
            f"start={self.start}": self.start != "model",
            "vocabulary=task": self.vocabulary == "task",
            "sparsify.choices": bool(self.sparsify.choices),
            "an INT4 grid": self.quantise is not None and not self.packs_base,
            "structure.order=importance": structure is not None and structure.order == "importance",
            "structure.budgets": structure is not None and bool(structure.budgets),
            "trust_remote_code": self.trust_remote_code,
        }
        return next((name for name, is_so in found.items() if is_so), None)

    @property
    def only_scores(self) -> bool:
        """Whether the model is scored as it comes, so that no training data is needed."""
        return self.method == "finetune" and set(self.baselines) <= {"dense"}

    @property
    def cuts_base(self) -> bool:
        """Whether sub-networks are models of their own, not adapters for one base."""
        return self.structure is not None or bool(self.sparsify.choices)

    @property
    def saves_models(self) -> bool:
        """Whether what is chosen is saved as models, not as adapters for one base."""
        return self.cuts_base or self.adapter.keep != "nothing"

    @property
    def merges(self) -> bool:
        """Whether adapters are added to the weights of what is saved and scored."""
        keeps = self.adapter.keep != "nothing"
        return keeps or (self.structure is not None and self.structure.merge)

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
    except (OSError, ValueError) as error:
        raise BadRecipe(
            f"cannot read the recipe {path}: {error}", try_="a file of recipes/, or a path to one"
        ) from error
    try:
        data = parse_yaml(text)
    except yaml.YAMLError as error:
        raise BadRecipe(
            f"{path} is not valid YAML: {error}",
            try_="look at that line: indent by blanks, quote values with ': ' or '#'",
        ) from error
    if not isinstance(data, dict):
        raise BadRecipe(f"{path} is not a recipe: it must be a YAML mapping of settings")
    for override in overrides:
        apply_override(data, override)
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


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one dotted key of a recipe's plain data, as ``--set`` does: ``section.key=value``.

    Raises:
        BadRecipe: not of that form, a place that has no keys, or a value that is no YAML.
    """
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
            raise BadRecipe(
                f"--set {override!r}: {section!r} has no keys of its own",
                try_="a setting of it: elastune --install-completion lists them behind --set",
            )
        place[section] = inner = dict(inner or {})
        place = inner
    try:
        place[last] = parse_yaml(value)
    except yaml.YAMLError as error:
        raise BadRecipe(
            f"--set {override!r}: the value is not valid YAML",
            try_="quotes around the whole: --set 'structure.ffn=[1.0, 0.5]'",
        ) from error


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
