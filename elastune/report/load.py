"""Read a run directory, whole or half finished, into one typed value."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from elastune.errors import BadArtifact
from elastune.json_text import parse_json
from elastune.metrics import METRICS
from elastune.report.fields import (
    AGAIN,
    check_fields,
    check_optional,
    read_json,
    read_rows,
    read_text,
)
from elastune.seals import check_rows

CURVE_FILES = {
    "supernet": "supernet/train.jsonl",
    "dense+full": "baselines/dense-full/train.jsonl",
    "dense+lora": "baselines/dense-lora/train.jsonl",
    "sparse+lora": "baselines/sparse-lora/train.jsonl",
}
USUAL_BASELINES = ("dense+lora", "sparse+lora")  # where the recipe does not name its own
# What plain fine-tuning never makes; with neither of these a run lacks nothing.
OF_SUPERNETS = frozenset({"base/sparsity.json", "space.json", "search/trials.json", "subnets/"})
Number = (int, float)
METRIC_FIELDS: dict[str, Any] = {
    "name": str,
    "task": str,
    "metric": str,
    "score": Number,
    "stderr": (int, float, type(None)),
    "n": int,
    "params": int,
    "nonzero": int,
    "macs": int,
    "seconds": Number,
}
TENSOR_FIELDS: dict[str, Any] = {"shape": list, "zeros": int, "sparsity": Number}
DIM_FIELDS: dict[str, Any] = {"name": str, "kind": str, "choices": list, "modules": list}
GENERATED_FIELDS: dict[str, Any] = {"points": list, "removed_blocks": list, "made_from": dict}
EXPORT_FIELDS: dict[str, Any] = dict.fromkeys(("folder", "label", "subnet", "loads_with"), str) | {
    "n_bytes": int
}
POINT_FIELDS: dict[str, Any] = {"target": Number, "cost": Number, "config": dict}
TRIAL_FIELDS: dict[str, Any] = {"number": int, "config": dict, "values": dict}
TRIAL_OPTIONS: dict[str, Any] = {"measured": dict, "dropped": bool, "equivalents": Number}
ABOUT_FIELDS: dict[str, Any] = {
    "algorithm": str,
    "seconds": Number,
    "equivalents": Number,
    "examples": int,
    "limits": list,
    "bounds": dict,
    "additivity": dict,
    "random": list,
}
STEP_FIELDS: dict[str, Any] = {"step": int, "loss": Number}
OTHER_FIELDS: dict[str, Any] = {
    "metric": str,
    "score": Number,
    "stderr": (int, float, type(None)),
    "n": int,
}
# Kinds of records by a field that only they have, first match, and what they must hold.
PREDICTION_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "nll": ("perplexity", {"nll": Number, "tokens": int}),
    "loglikelihoods": ("multiple-choice", {"prompt": str, "loglikelihoods": list}),
    "context": ("question-answering", {"question": str, "context": str, "prediction": str}),
    "prompt": ("generation", {"prompt": str, "text": str}),
    "correct": ("classification", {"text": str, "prediction": Number, "gold": Number}),
    "prediction": ("regression", {"text": str, "prediction": Number, "gold": Number}),
}


@dataclass(frozen=True)
class Curve:
    """Loss per optimizer step, and draws of each choice: ``draws[dim][choice index]``."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    tokens: int
    draws: tuple[Counter[int], ...] = ()


@dataclass(frozen=True)
class RunData:
    """What a run directory holds; None or empty where a file is not there (see ``missing``)."""

    path: Path
    recipe: dict[str, Any] | None = None
    manifest: dict[str, Any] | None = None
    metrics: dict[str, Any] | None = None
    sparsity: dict[str, Any] | None = None
    space: dict[str, Any] | None = None
    generated: dict[str, Any] | None = None  # only of runs whose space is made from importance
    search: dict[str, Any] | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    predictions: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)
    exports: list[dict[str, Any]] = field(default_factory=list)
    subnets: dict[str, str] = field(default_factory=dict)  # name -> peft, model or own-code
    architecture: str | None = None  # of base/: a class name such as LlamaForCausalLM
    missing: tuple[str, ...] = ()


def load_run(run_dir: Path) -> RunData:
    """Read every file of ``run_dir`` that the report shows.

    Raises:
        BadArtifact: no such directory, nothing of a run in it, or a file that is corrupt, of
            another schema or lacks a field (the message names file and field).
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise BadArtifact(f"no run directory at {run_dir}", try_="elastune run RECIPE makes one")
    parts = {
        "recipe.yaml": _read_recipe(run_dir / "recipe.yaml"),
        "manifest.json": _read_manifest(run_dir / "manifest.json"),
        "metrics.json": _read_metrics(run_dir / "metrics.json"),
        "base/sparsity.json": _read_sparsity(run_dir / "base" / "sparsity.json"),
        "space.json": _read_space(run_dir / "space.json"),
        "search/trials.json": _read_search(run_dir / "search" / "trials.json"),
    }
    recipe = parts["recipe.yaml"] or {}
    curves = {name: _read_curve(run_dir / file) for name, file in CURVE_FILES.items()}
    predictions = _read_predictions(run_dir / "predictions")
    subnets = _find_subnets(run_dir / "subnets")
    absent = [name for name, value in parts.items() if value is None]
    absent += [] if predictions else ["predictions/"]
    absent += [] if subnets else ["subnets/"]
    if len(absent) == len(parts) + 2 and not any(curves.values()):
        raise BadArtifact(
            f"{run_dir} holds none of the files of a run (metrics.json, recipe.yaml, ...)",
            try_="give the directory that `elastune run` wrote",
        )
    return RunData(
        path=run_dir,
        recipe=parts["recipe.yaml"],
        manifest=parts["manifest.json"],
        metrics=parts["metrics.json"],
        sparsity=parts["base/sparsity.json"],
        space=parts["space.json"],
        generated=_read_generated(run_dir / "generated.json"),
        search=parts["search/trials.json"],
        curves={name: curve for name, curve in curves.items() if curve is not None},
        predictions=predictions,
        exports=_read_exports(run_dir / "exports.json"),
        subnets=subnets,
        architecture=_architecture(run_dir / "base" / "config.json"),
        missing=(
            *(name for name in absent if not _is_plain(recipe) or name not in OF_SUPERNETS),
            *(CURVE_FILES[name] for name in _trained(recipe) if curves[name] is None),
        ),
    )


def _is_plain(recipe: Mapping[str, Any]) -> bool:
    """Tell whether a run is plain fine-tuning: it has baselines alone."""
    return recipe.get("method") == "finetune"


def _trained(recipe: Mapping[str, Any]) -> list[str]:
    """Name what a run trains, by the curve of its training."""
    named = recipe.get("baselines")
    wanted = named if isinstance(named, list) else USUAL_BASELINES
    nets = [] if _is_plain(recipe) else ["supernet"]
    return [name for name in CURVE_FILES if name in wanted or name in nets]


def kind_of(row: Mapping[str, Any]) -> str:
    """Tell the kind of task that a record of a prediction file is of; ``""`` for none known."""
    return next((kind for field, (kind, _) in PREDICTION_KINDS.items() if field in row), "")


def check_metrics(metrics: Mapping[str, Any], where: str = "metrics.json") -> None:
    """Check the rows of a ``metrics.json`` value.

    Raises:
        BadArtifact: a row lacks a field, is there twice, or has a fraction outside 0..1.
    """
    check_fields(metrics, {"rows": list}, where)
    check_rows(metrics, Path(where))
    seen: set[tuple[str, str, str]] = set()
    for number, row in enumerate(metrics["rows"]):
        at = f"{where}, row {number}"
        check_fields(row, METRIC_FIELDS, at)
        optional = {"latency_ms": Number, "config": dict, "other_metrics": list, "notes": str}
        optional["decode_latency_ms"] = Number
        check_optional(row, optional, at)
        key = (row["name"], row["task"], row["metric"])
        if key in seen:
            raise BadArtifact(f"{at}: a second row for {' / '.join(key)}", try_=AGAIN)
        seen.add(key)
        _check_fraction(row, at)
        for place, other in enumerate(row.get("other_metrics") or ()):
            check_fields(other, OTHER_FIELDS, f"{at}, other metric {place}")
            _check_fraction(other, f"{at}, other metric {place}")


def _check_fraction(row: Mapping[str, Any], at: str) -> None:
    metric = METRICS.get(row["metric"])
    if metric is not None and metric.unit == "fraction" and not 0 <= row["score"] <= 1:
        raise BadArtifact(
            f"{at}: {row['metric']} is a fraction 0..1, got {row['score']}", try_=AGAIN
        )


def _read_recipe(path: Path) -> dict[str, Any] | None:
    text = read_text(path)
    if text is None:
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadArtifact(f"{path} is not YAML: {error}", try_=AGAIN) from error
    if not isinstance(value, dict):
        raise BadArtifact(f"{path}: expected a mapping, got {type(value).__name__}", try_=AGAIN)
    return value


def _read_manifest(path: Path) -> dict[str, Any] | None:
    manifest = read_json(path)
    if manifest is not None:
        check_fields(manifest, {"stages": dict}, str(path))
        for stage, row in manifest["stages"].items():
            where = f"{path}, stage {stage!r}"
            check_fields(row, {"status": str}, where)
            check_optional(row, {"seconds": Number, "finished": str}, where)
    return manifest


def _read_metrics(path: Path) -> dict[str, Any] | None:
    metrics = read_json(path)
    if metrics is not None:
        check_metrics(metrics, str(path))
    return metrics


def _read_sparsity(path: Path) -> dict[str, Any] | None:
    sparsity = read_json(path)
    if sparsity is not None:
        check_fields(sparsity, {"tensors": dict, "total": dict}, str(path))
        for name, row in sparsity["tensors"].items():
            check_fields(row, TENSOR_FIELDS, f"{path}, tensor {name!r}")
        total = {"zeros": int, "weights": int, "sparsity": Number}
        check_fields(sparsity["total"], total, f"{path}, total")
    return sparsity


def _read_space(path: Path) -> dict[str, Any] | None:
    space = read_json(path)
    if space is not None:
        check_fields(space, {"dims": list}, str(path))
        for number, dim in enumerate(space["dims"]):
            check_fields(dim, DIM_FIELDS, f"{path}, dim {number}")
    return space


def _read_generated(path: Path) -> dict[str, Any] | None:
    made = read_json(path)
    if made is not None:
        check_fields(made, GENERATED_FIELDS, str(path))
        check_fields(made["made_from"], {"full_sizes": dict}, f"{path}, made_from")
        _check_sizes(made["made_from"]["full_sizes"], f"{path}, full_sizes")
        _check_sizes(dict(enumerate(made["removed_blocks"])), f"{path}, removed_blocks")
        for number, point in enumerate(made["points"]):
            check_fields(point, POINT_FIELDS, f"{path}, point {number}")
            _check_sizes(point["config"], f"{path}, point {number}, config")
    return made


def _read_exports(path: Path) -> list[dict[str, Any]]:
    found = read_json(path)
    if found is not None:
        check_fields(found, {"exports": list}, str(path))
    rows = [] if found is None else found["exports"]
    for number, row in enumerate(rows):
        check_fields(row, EXPORT_FIELDS, f"{path}, export {number}")
    return list(rows)


def _check_sizes(sizes: Mapping[Any, Any], where: str) -> None:
    check_fields(sizes, dict.fromkeys(sizes, int), where)


def _read_search(path: Path) -> dict[str, Any] | None:
    search = read_json(path)
    if search is not None:
        check_fields(search, {"trials": list}, str(path))
        check_optional(search, {"pareto": list, "best": int, "about": dict}, str(path))
        about = search.get("about") or {}
        check_optional(about, ABOUT_FIELDS, f"{path}, about")
        _check_trials(search["trials"], f"{path}, trial")
        _check_trials(about.get("random") or (), f"{path}, random trial")
    return search


def _check_trials(trials: Sequence[Any], where: str) -> None:
    for number, trial in enumerate(trials):
        check_fields(trial, TRIAL_FIELDS, f"{where} {number}")
        check_optional(trial, TRIAL_OPTIONS, f"{where} {number}")


def _read_curve(path: Path) -> Curve | None:
    if not path.is_file():
        return None
    losses: dict[int, float] = {}  # by step: a resumed run writes some steps twice, the last counts
    draws: list[Counter[int]] = []
    tokens = 0
    for row in read_rows(path, STEP_FIELDS):
        losses[row["step"]] = float(row["loss"])
        tokens += int(row.get("tokens") or 0)
        for config in row.get("configs") or ():
            draws += [Counter() for _ in range(len(config) - len(draws))]
            for counter, choice in zip(draws, config, strict=False):
                counter[choice] += 1
    steps = tuple(sorted(losses))
    return Curve(steps, tuple(losses[step] for step in steps), tokens, tuple(draws))


def _read_predictions(folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        name, _, task = path.stem.partition(".")
        found[name, task] = rows = list(read_rows(path, {}))
        fields = dict(PREDICTION_KINDS.values()).get(kind_of(rows[0]), {}) if rows else {}
        for number, row in enumerate(rows, start=1):
            check_fields(row, fields, f"{path}, line {number}")
    return found


def prediction_name(task: str) -> str:
    """Return how the names of prediction files spell a task."""
    return re.sub("[:/]", "_", task)


def _find_subnets(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.glob("*")):
        if (path / "adapter_config.json").is_file():
            found[path.name] = "peft"
        elif (path / "config.json").is_file():
            # Blocks of several sizes come with the code that builds them.
            is_stock = "auto_map" not in (read_text(path / "config.json") or "")
            found[path.name] = "model" if is_stock else "own-code"
    return found


def _architecture(path: Path) -> str | None:
    text = read_text(path)
    try:
        names = parse_json(text or "{}").get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise BadArtifact(f"{path} is not a model's config.json: {error}", try_=AGAIN) from error
    named = names[0] if isinstance(names, list) and names else None
    return named if isinstance(named, str) else None
