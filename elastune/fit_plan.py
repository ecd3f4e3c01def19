"""The plan of a fit: which method, how long each stage takes, what a time limit cuts.

Arithmetic on what `elastune.fit_facts` measured of model, task and device; nothing is loaded here.
docs/fit.md tells how it plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from elastune.config import Recipe, apply_override, make_recipe
from elastune.errors import BadRecipe
from elastune.fit_recipe import REFERENCES, Method, base_recipe
from elastune.fit_request import Facts, Request
from elastune.search.limits import Limit

SPARE = 0.15
"""Part of a time limit that is left free: what was measured in seconds drifts over hours."""
TARGET_TRIALS = 8
"""Most trials that the choice for the target adds to the search's."""
SANDWICH = 1.75
"""Time of a sandwich step (largest, random and smallest sub-network) in plain steps."""
SMALLER = 0.7
"""Time of a sub-network, on the average of a search or of a ranking in rounds, in full models."""
FORWARD = 1 / 3
"""Time of a forward pass as a part of a training step."""


@dataclass(frozen=True)
class Speed:
    """Measured seconds on this device.

    Attributes:
        step: of a training step of the full model on one batch.
        score: to score one example of the task.
    """

    step: float
    score: float


@dataclass(frozen=True)
class Knobs:
    """What a time limit cuts, in this order; each has a least value."""

    epochs: float
    n_train: int
    trials: int
    n_validation: int
    n_report: int


LEAST = Knobs(epochs=1.0, n_train=1000, trials=12, n_validation=100, n_report=200)
"""Below these a result says nothing."""
FEW_STEPS = 300
"""Training steps below which a plan warns."""


@dataclass(frozen=True)
class Stage:
    """A line of the plan."""

    name: str
    what: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What is going to be done.

    Attributes:
        recipe: of the run.
        reference: system that the drop is against.
        stages: with their estimated times.
        knobs: what the time limit left.
        speed: that the times are made from.
        notes: what the user should know.
    """

    recipe: Recipe
    reference: str
    stages: tuple[Stage, ...]
    knobs: Knobs
    speed: Speed
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def seconds(self) -> float:
        """Estimated time of everything."""
        return sum(stage.seconds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "reference": self.reference,
            "seconds": round(self.seconds, 1),
            "stages": [asdict(stage) for stage in self.stages],
            "knobs": asdict(self.knobs),
            "speed": asdict(self.speed),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str) -> Plan:
        """Read back what `to_dict` returned; ``source`` is named in errors."""
        return cls(
            recipe=make_recipe(data["recipe"], source),
            reference=data["reference"],
            stages=tuple(Stage(**stage) for stage in data["stages"]),
            knobs=Knobs(**data["knobs"]),
            speed=Speed(**data["speed"]),
            notes=tuple(data["notes"]),
        )


def choose_method(request: Request, facts: Facts) -> Method:
    """Return the method for a model and its targets, unless the request sets one."""
    given = [t.partition("=")[2].strip() for t in request.overrides if t.startswith("method=")]
    if given:
        if given[-1] not in REFERENCES:
            raise BadRecipe(f"--set method={given[-1]}: a fit is by one of {', '.join(REFERENCES)}")
        return given[-1]  # type: ignore[return-value]
    if set(request.costs) == {"nonzero"}:
        return "shears"
    return "eftnas" if facts.kind == "encoder" else "lonas"


def draft(request: Request, facts: Facts) -> tuple[Recipe, tuple[str, ...]]:
    """Return the recipe without a time limit, and what the user should know of it.

    Raises:
        BadRecipe: a target on what the model does not have; settings that do not go together.
    """
    method = choose_method(request, facts)
    parts = target_parts(request.limits, facts.full)
    data, notes = base_recipe(method, request, facts, parts)
    for override in request.overrides:
        apply_override(data, override)
    return make_recipe(data, "the plan"), notes


def target_parts(limits: Sequence[Limit], full: Mapping[str, float]) -> dict[str, float]:
    """Return name of a cost -> the part of the full model's that is allowed.

    Raises:
        BadRecipe: the full model has no such cost.
    """
    found: dict[str, float] = {}
    for limit in limits:
        if not full.get(limit.name):
            raise BadRecipe(
                f"--target {limit}: this model has no {limit.name}; it has "
                f"{', '.join(name for name, value in full.items() if value)}"
            )
        part = limit.number if limit.part else limit.number / full[limit.name]
        found[limit.name] = min(part, found.get(limit.name, math.inf))
    return found


def make_plan(request: Request, facts: Facts, speed: Speed) -> Plan:
    """Plan a fit, within the request's time limit if it has one.

    Raises:
        BadRecipe: the least there is to do takes longer than the limit.
    """
    recipe, notes = draft(request, facts)
    whole = whole_knobs(recipe, facts)
    least = least_knobs(whole, request.overrides)

    def seconds(knobs: Knobs) -> float:
        return sum(s.seconds for s in stages(recipe, request, facts, speed, knobs))

    knobs = whole
    if request.hours is not None:
        knobs = cut(whole, least, seconds, 3600 * request.hours * (1 - SPARE))
    cuts = [
        f"{name}: {getattr(knobs, name):g} of {getattr(whole, name):g}, to keep the time limit"
        for name in asdict(whole)
        if getattr(knobs, name) != getattr(whole, name)
    ]
    steps = step_count(recipe, knobs)
    if cuts and steps < FEW_STEPS:
        cuts.append(
            f"{steps} training steps teach neither the reference nor the super-network much: what "
            "one scores against the other says little"
        )
    return Plan(
        with_knobs(recipe, request, knobs, whole),
        REFERENCES[recipe.method],
        tuple(stages(recipe, request, facts, speed, knobs)),
        knobs,
        speed,
        (*notes, *cuts),
    )


def whole_knobs(recipe: Recipe, facts: Facts) -> Knobs:
    """Return what is done without a time limit."""
    left = max(1, facts.n_train - recipe.data.n_validation)
    return Knobs(
        recipe.train.epochs,
        min(recipe.data.n_train or left, left),
        recipe.search.trials,
        recipe.data.n_validation,
        min(recipe.task.limit or facts.n_report, facts.n_report),
    )


_KEYS = {
    "epochs": ("train.epochs", "train.max_steps"),
    "n_train": ("data.n_train",),
    "trials": ("search.trials",),
    "n_validation": ("data.n_validation",),
    "n_report": ("task.limit",),
}


def least_knobs(whole: Knobs, overrides: Sequence[str]) -> Knobs:
    """Return how far a time limit may cut; what the user set is not cut."""
    given = {text.partition("=")[0].strip() for text in overrides}
    found = {}
    for name, value in asdict(whole).items():
        is_set = given.intersection(_KEYS[name])
        found[name] = value if is_set else min(value, getattr(LEAST, name))
    return Knobs(**found)


def cut(whole: Knobs, least: Knobs, seconds: Callable[[Knobs], float], budget: float) -> Knobs:
    """Return the knobs that fit into a budget: one after the other is cut, in their order.

    Args:
        whole: without any limit.
        least: values that none goes below.
        seconds: what knobs take; falls with each of them.
        budget: in seconds.

    Raises:
        BadRecipe: even the least takes longer; it says how long.
    """
    knobs = whole
    for name in asdict(whole):
        if seconds(knobs) <= budget:
            return knobs
        low, high = getattr(least, name), getattr(knobs, name)
        if seconds(_turned(knobs, name, low)) > budget:
            knobs = _turned(knobs, name, low)
            continue
        unit = 0.01 if isinstance(high, float) else 1
        steps = [0, round((high - low) / unit)]
        while steps[1] - steps[0] > 1:
            middle = sum(steps) // 2
            fits = seconds(_turned(knobs, name, _at(low, middle, unit))) <= budget
            steps[0 if fits else 1] = middle
        return _turned(knobs, name, _at(low, steps[0], unit))
    if seconds(knobs) <= budget:
        return knobs
    hours = seconds(knobs) / (1 - SPARE) / 3600
    raise BadRecipe(
        f"--hours: the least that can be done takes about {hours:.2g} hours here ({knobs.epochs:g} "
        f"epochs of {knobs.n_train} examples, {knobs.trials} trials on {knobs.n_validation} "
        f"examples, a report on {knobs.n_report})",
        try_=f"--hours {math.ceil(hours * 100) / 100:g}, a smaller model, or a GPU",
    )


def _turned(knobs: Knobs, name: str, value: float) -> Knobs:
    return Knobs(**{**asdict(knobs), name: value})


def _at(low: float, step: int, unit: float) -> float:
    return low + step if unit == 1 else round(low + step * unit, 2)


def with_knobs(recipe: Recipe, request: Request, knobs: Knobs, whole: Knobs) -> Recipe:
    """Write into the recipe what a time limit changed."""
    changed = {n for n in asdict(whole) if getattr(knobs, n) != getattr(whole, n)}
    data = recipe.model_dump(mode="json")
    for name in changed:
        section, key = _KEYS[name][0].split(".")
        data[section][key] = getattr(knobs, name)
    if data["importance"] is not None:
        data["importance"]["examples"] = looked_at(recipe, request, knobs)
    return make_recipe(data, "the plan")


def looked_at(recipe: Recipe, request: Request, knobs: Knobs) -> int:
    """Return the examples that importance is measured on: fewer where training sees few."""
    if recipe.importance is None:
        return 0
    wanted = recipe.importance.examples
    if any(text.startswith("importance.examples=") for text in request.overrides):
        return wanted
    return min(wanted, knobs.n_train, max(128, knobs.n_train // 8))


def stages(
    recipe: Recipe, request: Request, facts: Facts, speed: Speed, knobs: Knobs
) -> list[Stage]:
    """Estimate what each stage of a run takes."""
    each = speed.step / recipe.train.batch_size
    steps = step_count(recipe, knobs)
    training = steps * recipe.train.accumulation * speed.step
    found = [Stage("reference", f"{REFERENCES[recipe.method]}, {steps} steps", training)]
    ask = 0.0
    if recipe.importance is not None:
        examples, rounds = looked_at(recipe, request, knobs), recipe.importance.rounds
        if recipe.importance.method != "fisher":
            rounds = 1
        seconds = SMALLER * rounds * examples * each
        found.append(Stage("importance", f"{rounds} rounds of {examples} examples", seconds))
    if recipe.train.distill.has_outside_teacher:
        ask = knobs.n_train * each * FORWARD
    factor = SANDWICH if recipe.train.sampler == "sandwich" else 1.0
    sampler = f"{recipe.train.sampler} sub-networks, {steps} steps"
    found.append(Stage("super-network", sampler, factor * training + ask))
    probes = min(recipe.structure.probes, knobs.n_validation) if recipe.structure else 0
    n_choices = choice_count(recipe, facts)
    trial = SMALLER * knobs.n_validation * speed.score
    is_estimated = recipe.search.losses_from == "estimated"
    prepared = probes * each * (1 if is_estimated else n_choices * FORWARD)
    latencies = [v for n, v in facts.full.items() if n.startswith(("latency", "decode_latency"))]
    if any("latency" in name for name in request.costs):
        # Rounds of a prefill and a few tokens, of every choice.
        prepared += n_choices * 9 * (latencies[0] + 8 * sum(latencies[1:])) / 1000
    what = f"{knobs.trials} trials on {knobs.n_validation} examples"
    found.append(Stage("search", what, prepared + knobs.trials * trial))
    found.append(
        Stage("choice", f"up to {TARGET_TRIALS} trials at the target", (TARGET_TRIALS + 1) * trial)
    )
    loads = 12 * facts.load_seconds
    found.append(Stage("extraction", "written, reloaded, compared; all loading", loads + 15))
    report = 2 * knobs.n_report * speed.score
    found.append(Stage("evaluation", f"both on {knobs.n_report} report examples", report))
    return found


def step_count(recipe: Recipe, knobs: Knobs) -> int:
    """Return the optimizer steps of a training."""
    per_step = recipe.train.batch_size * recipe.train.accumulation
    steps = math.ceil(knobs.epochs * math.ceil(knobs.n_train / per_step))
    return recipe.train.max_steps or steps


def choice_count(recipe: Recipe, facts: Facts) -> int:
    """Return about how many single choices of structure there are to be measured."""
    structure = recipe.structure
    if structure is None:
        return 0
    if structure.generate is not None:
        points = structure.generate.points
        count = points if isinstance(points, int) else len(points)
        return 2 * facts.blocks * max(0, count - 1)
    per_block = 0
    for sizes in (structure.ffn, structure.heads):
        per_block += len(sizes) - 1 if isinstance(sizes, list) else 0
    depth = structure.depth
    return facts.blocks * per_block + (facts.blocks if depth == "all" else len(depth or ()))
