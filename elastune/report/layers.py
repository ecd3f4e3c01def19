"""Names of tensors and dims as (layer, role), so that they can be drawn layer by layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from elastune.report.quantities import is_number

NUMBERED = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")


def split_name(name: str) -> tuple[int | None, str]:
    """Split ``model.layers.3.mlp.up_proj.weight`` into ``(3, "mlp.up_proj")``; no number: None."""
    match = NUMBERED.match(name.removesuffix(".weight"))
    if match is None:
        return None, name.removesuffix(".weight")
    return int(match[1]), match[2]


def by_role(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names that differ in the layer number only, under the shortest distinct label."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(split_name(name)[1], []).append(name)
    labels = short_labels(groups)
    return {labels[role]: members for role, members in groups.items()}


def short_labels(names: Iterable[str]) -> dict[str, str]:
    """Shorten dotted names to as few last parts as keep them distinct."""
    todo, labels, parts = list(names), {}, 1
    while todo:
        cut = {name: ".".join(name.split(".")[-parts:]) for name in todo}
        taken = list(cut.values())
        unique = {n: s for n, s in cut.items() if taken.count(s) == 1 or s == n}
        labels.update(unique)
        todo = [name for name in todo if name not in unique]
        parts += 1
    return labels


def grid(values: Mapping[str, Any]) -> tuple[list[str], list[int], dict[tuple[str, int], Any]]:
    """Arrange values by name as (roles, layers, value at (role, layer)).

    Names without a layer number are left out.
    """
    roles, cells, layers = [], {}, set()
    for role, names in by_role(values).items():
        for name in names:
            layer = split_name(name)[0]
            if layer is not None:
                cells[role, layer] = values[name]
                layers.add(layer)
        if any((role, layer) in cells for layer in layers):
            roles.append(role)
    return roles, sorted(layers), cells


def config_text(config: Mapping[str, Any], limit: int = 320) -> str:
    """Spell a configuration in a line: per role its choices by layer, repeats as ``24 x5``."""
    parts = []
    for role, names in by_role(config).items():
        ordered = sorted(names, key=lambda name: split_name(name)[0] or 0)
        parts.append(f"{role}: {_runs([config[name] for name in ordered])}")
    text = "; ".join(parts)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def uniform_text(config: Mapping[str, Any]) -> str | None:
    """Describe a configuration that has one choice per role (``24 everywhere``); None otherwise."""
    values = {role: {str(config[n]) for n in names} for role, names in by_role(config).items()}
    if any(len(choices) > 1 for choices in values.values()):
        return None
    single = {role: next(iter(choices)) for role, choices in values.items()}
    if len(set(single.values())) == 1:
        return f"{next(iter(single.values()))} everywhere"
    return ", ".join(f"{role} {choice}" for role, choice in single.items())


def _runs(values: list[Any]) -> str:
    runs: list[tuple[Any, int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    return " ".join(str(value) if count == 1 else f"{value} x{count}" for value, count in runs)


def largest_choices(
    space: Mapping[str, Any] | None, configs: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
    """Return the largest choice of each dim of ``space.json``; without it, that the configs use."""
    if space is not None:
        tops = {dim["name"]: [c for c in dim["choices"] if is_number(c)] for dim in space["dims"]}
        return {name: max(choices) for name, choices in tops.items() if choices}
    found: dict[str, float] = {}
    for config in configs:
        for dim, choice in config.items():
            if is_number(choice):
                found[dim] = max(found.get(dim, 0), choice)
    return found


def share_of(choice: Any, top: float | None) -> float:
    """Return a choice as a part of the largest one."""
    if is_number(choice) and top:
        return float(choice) / top
    return 1.0 if choice else 0.0
