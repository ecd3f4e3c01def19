"""What the shell offers when tab is pressed: recipes, runs, settings, names; without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer

#: As `elastune.export.registry` has them; spelt here, since reading that imports torch.
FORMATS: Mapping[str, tuple[str, ...]] = {
    "hf": (),
    "hf-padded": (),
    "hf-hetero": (),
    "compressed-tensors": (),
    "peft": (),
    "merged-sparse": (),
    "onnx": (),
    "openvino": ("int8", "int4"),
    "torch-export": (),
    "gguf": ("float16", "bfloat16", "q8_0", "q4_0"),
    "nemotron-nas": (),
}
SAVED = ("auto", "hf", "hf-padded", "hf-hetero")
#: As `elastune.models.builtin` has them, for the same reason.
MODELS = ("smollm2-135m", "minilm-l6")
NAMED = ("best", "heuristic", "largest", "smallest")
_DEPTH = 2
"""Folders below the one named in which recipes and runs are looked for."""


def recipes_and_runs(incomplete: str) -> list[str]:
    """Offer recipe files and run directories that begin so, and those in folders that do."""
    return sorted(_sources(incomplete, (".yaml",)))


def runs(incomplete: str) -> list[str]:
    """Offer run directories."""
    return sorted(_sources(incomplete, ()))


def exports(incomplete: str) -> list[str]:
    """Offer folders of exports, below ``runs/`` too."""
    shown = [incomplete, *(f"{run}/export/" for run in runs(incomplete))]
    found = [path.parent for text in shown for path in Path().glob(f"{text}*/export.json")]
    deeper = [path.parent for text in shown for path in Path().glob(f"{text}*/*/export.json")]
    return sorted({str(path) for path in [*found, *deeper]})


def _sources(incomplete: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    folder, _, begun = incomplete.rpartition("/")
    start = Path(folder) if folder else Path("/" if incomplete.startswith("/") else ".")
    try:
        entries = [entry for entry in start.iterdir() if entry.name.startswith(begun)]
    except OSError:
        return
    for entry in entries:
        if not entry.name.startswith(".") or begun.startswith("."):
            yield from _below(entry, suffixes, _DEPTH)


def _below(path: Path, suffixes: tuple[str, ...], depth: int) -> Iterator[str]:
    """Yield a recipe, a run, or what is below a folder that is neither."""
    if path.suffix in suffixes:
        yield str(path)
    elif depth and path.is_dir() and not path.is_symlink():
        if (path / "recipe.yaml").is_file():
            yield str(path)
            return
        try:
            inner = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        except OSError:
            return
        for entry in inner:
            yield from _below(entry, suffixes, depth - 1)


def algorithms(incomplete: str) -> list[str]:
    """Offer the search algorithms."""
    from elastune.sections.search import SearchConfig

    return _begun(get_args(SearchConfig.model_fields["algorithm"].annotation), incomplete)


def costs(incomplete: str) -> list[str]:
    """Offer the costs that a sweep can bound."""
    from elastune.sections.search import Cost

    return _begun(get_args(Cost), incomplete)


def formats(incomplete: str) -> list[str]:
    """Offer export formats, after a comma the next one; kinds of weights once a format is there."""
    before, comma, last = incomplete.rpartition(",")
    name, colon, weights = last.partition(":")
    if colon:
        found = [f"{name}:{kind}" for kind in _begun(FORMATS.get(name, ()), weights)]
    else:
        found = _begun(FORMATS, last)
        found += [f"{each}:{kind}" for each in found if each == last for kind in FORMATS[each]]
    return [f"{before}{comma}{each}" for each in found]


def saved_formats(incomplete: str) -> list[str]:
    """Offer the formats in which a run writes its sub-networks."""
    return _begun(SAVED, incomplete)


def models(incomplete: str) -> list[str]:
    """Offer the built-in models."""
    return _begun(MODELS, incomplete)


def tasks(incomplete: str) -> list[str]:
    """Offer the known tasks."""
    from elastune.tasks import TASKS

    return _begun(TASKS, incomplete)


def subnets(context: typer.Context, incomplete: str) -> list[str]:
    """Offer sub-networks by name: of the run that the command line has, or the usual ones."""
    # While the shell asks, what stands before options is among the rest, not yet a parameter.
    given = [Path(text) / "subnets" for text in context.args]
    there = [path.name for folder in given if folder.is_dir() for path in folder.iterdir()]
    return _begun(sorted({*NAMED, *there}), incomplete)


def settings(incomplete: str) -> list[str]:
    """Offer ``section.key=``; behind the equals sign the values of settings that name theirs."""
    from elastune.config import Recipe

    name, equals, value = incomplete.partition("=")
    found = dict(_settings(Recipe)) | {"model": MODELS, "task": tuple(tasks(""))}
    if not equals:
        return [f"{each}=" for each in found if each.startswith(incomplete)]
    return [f"{name}={each}" for each in found.get(name, ()) if each.startswith(value)]


def _settings(section: Any, place: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield every setting by its dotted name, with its values where they are listed."""
    for name, field in section.model_fields.items():
        path = f"{place}{name}"
        parts = _parts(field.annotation)
        inner = [part for part in parts if hasattr(part, "model_fields")]
        if inner:
            yield from _settings(inner[0], f"{path}.")
            continue
        values = [str(v) for part in parts if get_origin(part) is Literal for v in get_args(part)]
        if bool in parts:
            values += ["true", "false"]
        yield path, tuple(values)


def _parts(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _begun(names: Any, incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
